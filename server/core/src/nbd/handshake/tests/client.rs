//! A client and a driver of the machine in one.

use super::super::*;
use uuid::Uuid;

pub(super) fn export(id: u128, name: &str) -> Export {
    Export {
        volume: VolumeId(Uuid::from_u128(id)),
        name: name.to_owned(),
        description: format!("the {name} volume"),
        size_bytes: 64 << 20,
        read_only: false,
        token: None,
    }
}

/// A client and a driver in one: sends options, answers the machine's questions from two exports.
pub(super) struct Client {
    pub(super) machine: Handshake,
    pub(super) out: Vec<u8>,
    pub(super) last: Step,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) option: u32,
    pub(super) kind: u32,
    pub(super) data: Vec<u8>,
}

pub(super) fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

pub(super) fn info_data(name: &[u8], types: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&(types.len() as u16).to_be_bytes());
    for kind in types {
        data.extend_from_slice(&kind.to_be_bytes());
    }
    data
}

pub(super) fn meta_data(name: &[u8], queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

fn catalogue(name: &str) -> Resolution {
    match name {
        "disk" | "00000000-0000-0000-0000-000000000001" => Resolution::Found(export(1, "disk")),
        "other" => Resolution::Found(Export {
            read_only: true,
            token: None,
            description: String::new(),
            ..export(2, "other")
        }),
        "broken" => Resolution::Unavailable("its store is poisoned".to_owned()),
        "held" => Resolution::Forbidden("somebody else has it".to_owned()),
        "late" => Resolution::ShuttingDown,
        _ => Resolution::Unknown,
    }
}

impl Client {
    pub(super) fn connect(tls: TlsMode, client_flags: u32) -> Client {
        Client::connect_with(tls, Limits::default(), client_flags)
    }

    pub(super) fn connect_with(tls: TlsMode, limits: Limits, client_flags: u32) -> Client {
        let mut out = Vec::new();
        let machine = Handshake::new(tls, limits, &mut out);
        assert_eq!(out, b"NBDMAGICIHAVEOPT\0\x03");
        let mut client = Client {
            machine,
            out: Vec::new(),
            last: Step::NeedInput,
        };
        client.send(&client_flags.to_be_bytes());
        client
    }

    pub(super) fn plain() -> Client {
        Client::connect(TlsMode::Off, super::FIXED_NO_ZEROES)
    }

    pub(super) fn structured() -> Client {
        let mut client = Client::plain();
        assert_eq!(client.kinds(option::STRUCTURED_REPLY, &[]), [1]);
        client
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.machine.feed(bytes);
        self.run();
    }

    pub(super) fn run(&mut self) {
        loop {
            self.last = self.machine.step(&mut self.out);
            match &self.last {
                Step::Resolve(name) => {
                    let resolution = catalogue(name);
                    self.machine.resolved(resolution, &mut self.out);
                }
                Step::List => {
                    let names = ["disk", "other"].map(|name| ExportName {
                        name: name.to_owned(),
                        description: format!("the {name} volume"),
                    });
                    self.machine.listed(Ok(&names), &mut self.out);
                }
                Step::StartTls => return,
                Step::NeedInput | Step::Enter(_) | Step::Close(_) => return,
            }
        }
    }

    pub(super) fn option(&mut self, option: u32, data: &[u8]) -> Vec<Reply> {
        self.out.clear();
        self.send(&option_bytes(option, data));
        replies(&self.out)
    }

    /// The reply types to an option.
    pub(super) fn kinds(&mut self, option: u32, data: &[u8]) -> Vec<u32> {
        let replies = self.option(option, data);
        assert!(replies.iter().all(|reply| reply.option == option));
        replies.into_iter().map(|reply| reply.kind).collect()
    }

    pub(super) fn closed(&self) -> CloseReason {
        match self.last {
            Step::Close(reason) => reason,
            ref other => panic!("not closed: {other:?}"),
        }
    }

    pub(super) fn entered(&self) -> Session {
        match &self.last {
            Step::Enter(session) => session.clone(),
            other => panic!("not entered: {other:?}"),
        }
    }
}

pub(super) fn replies(mut bytes: &[u8]) -> Vec<Reply> {
    let mut replies = Vec::new();
    while !bytes.is_empty() {
        let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(bytes[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        let length = word(16) as usize;
        replies.push(Reply {
            option: word(8),
            kind: word(12),
            data: bytes[20..20 + length].to_vec(),
        });
        bytes = &bytes[20 + length..];
    }
    replies
}
