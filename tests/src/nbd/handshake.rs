//! Option haggling.

use std::io;

use super::connection::{Address, Connection};
use super::transmission::{Failure, HeaderStyle, Transmission};
use super::wire;

/// One reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    pub option: u32,
    pub kind: u32,
    pub data: Vec<u8>,
}

impl OptionReply {
    pub fn is_error(&self) -> bool {
        self.kind & wire::REP_ERROR_BIT != 0
    }

    /// Whether the server has now said all it has to say about the option.
    pub fn is_final(&self) -> bool {
        self.is_error() || self.kind == wire::REP_ACK
    }

    /// The data as text: the words of an error reply.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.data).into_owned()
    }
}

/// What a server tells about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Info {
    Export {
        size_bytes: u64,
        flags: u16,
    },
    Name(String),
    Description(String),
    BlockSize {
        minimum: u32,
        preferred: u32,
        max_payload: u32,
    },
    Other(u16, Vec<u8>),
}

impl Info {
    /// Parses the data of a `REP_INFO`; the lengths are checked exactly.
    pub fn parse(data: &[u8]) -> Result<Info, Failure> {
        let bad = || Failure::Protocol(format!("malformed info reply {data:02x?}"));
        let (kind, body) = data.split_at_checked(2).ok_or_else(bad)?;
        let text = || String::from_utf8(body.to_vec()).map_err(|_| bad());
        let kind = u16::from_be_bytes([kind[0], kind[1]]);
        match kind {
            wire::INFO_EXPORT => {
                let body: [u8; 10] = body.try_into().map_err(|_| bad())?;
                let (size, flags) = body.split_at(8);
                Ok(Info::Export {
                    size_bytes: u64::from_be_bytes(size.try_into().map_err(|_| bad())?),
                    flags: u16::from_be_bytes(flags.try_into().map_err(|_| bad())?),
                })
            }
            wire::INFO_NAME => Ok(Info::Name(text()?)),
            wire::INFO_DESCRIPTION => Ok(Info::Description(text()?)),
            wire::INFO_BLOCK_SIZE => {
                let body: [u8; 12] = body.try_into().map_err(|_| bad())?;
                let word = |at: usize| {
                    u32::from_be_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]])
                };
                Ok(Info::BlockSize {
                    minimum: word(0),
                    preferred: word(4),
                    max_payload: word(8),
                })
            }
            other => Ok(Info::Other(other, body.to_vec())),
        }
    }
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
pub fn export_request(export: &[u8], infos: &[u16]) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(export);
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    for info in infos {
        data.extend_from_slice(&info.to_be_bytes());
    }
    data
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
pub fn meta_request(export: &[u8], queries: &[&str]) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(export);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

/// A connection in the middle of the handshake.
pub struct Handshake {
    pub connection: Connection,
    /// The server's handshake flags.
    pub server_flags: u16,
    no_zeroes: bool,
    style: HeaderStyle,
    allocation: Option<u32>,
}

impl Handshake {
    /// Reads the greeting and answers with both known client flags.
    pub fn begin(address: &Address) -> Result<Handshake, Failure> {
        Handshake::with_client_flags(
            address,
            u32::from(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES),
        )
    }

    /// Reads the greeting and answers with `flags`, whatever they mean.
    pub fn with_client_flags(address: &Address, flags: u32) -> Result<Handshake, Failure> {
        let mut connection = address.connect()?;
        let (magic, version) = (connection.take_u64()?, connection.take_u64()?);
        if magic != wire::NBDMAGIC || version != wire::IHAVEOPT {
            return Err(Failure::Protocol(format!(
                "greeting {magic:#x} {version:#x}"
            )));
        }
        let server_flags = connection.take_u16()?;
        connection.send(&flags.to_be_bytes())?;
        let no_zeroes = server_flags & wire::FLAG_NO_ZEROES != 0
            && flags & u32::from(wire::FLAG_NO_ZEROES) != 0;
        Ok(Handshake {
            connection,
            server_flags,
            no_zeroes,
            style: HeaderStyle::Simple,
            allocation: None,
        })
    }

    /// Sends an option and waits for nothing.
    pub fn send_option(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(16 + data.len());
        bytes.extend_from_slice(&wire::IHAVEOPT.to_be_bytes());
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        self.connection.send(&bytes)
    }

    /// The next reply.
    pub fn reply(&mut self) -> Result<OptionReply, Failure> {
        let magic = self.connection.take_u64()?;
        if magic != wire::OPTION_REPLY_MAGIC {
            return Err(Failure::Protocol(format!("option reply magic {magic:#x}")));
        }
        let (option, kind) = (self.connection.take_u32()?, self.connection.take_u32()?);
        let length = self.connection.take_u32()? as usize;
        if length > 1 << 20 {
            return Err(Failure::Protocol(format!("option reply of {length} bytes")));
        }
        Ok(OptionReply {
            option,
            kind,
            data: self.connection.take(length)?,
        })
    }

    /// Sends an option and reads all its replies, the last one being final.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Result<Vec<OptionReply>, Failure> {
        self.send_option(option, data)?;
        let mut replies = Vec::new();
        loop {
            let reply = self.reply()?;
            if reply.option != option {
                return Err(Failure::Protocol(format!(
                    "asked option {option}, answered {}",
                    reply.option
                )));
            }
            let done = reply.is_final();
            replies.push(reply);
            if done {
                return Ok(replies);
            }
        }
    }

    /// The kind of the final reply to an option.
    pub fn verdict(&mut self, option: u32, data: &[u8]) -> Result<u32, Failure> {
        Ok(self
            .option(option, data)?
            .last()
            .expect("a final reply")
            .kind)
    }

    /// Like [`Handshake::option`], but anything except an acknowledgement is an error. Remembers what was negotiated.
    pub fn acknowledged(&mut self, option: u32, data: &[u8]) -> Result<Vec<OptionReply>, Failure> {
        let replies = self.option(option, data)?;
        let last = replies.last().expect("a final reply");
        if last.is_error() {
            return Err(Failure::Refused {
                option,
                kind: last.kind,
                text: last.text(),
            });
        }
        match option {
            wire::OPT_STRUCTURED_REPLY => self.style = HeaderStyle::Structured,
            wire::OPT_EXTENDED_HEADERS => self.style = HeaderStyle::Extended,
            _ => {}
        }
        Ok(replies)
    }

    /// Selects `base:allocation` and remembers its id.
    pub fn select_allocation(&mut self, export: &str) -> Result<u32, Failure> {
        let data = meta_request(export.as_bytes(), &["base:allocation"]);
        let replies = self.acknowledged(wire::OPT_SET_META_CONTEXT, &data)?;
        let context = match replies.as_slice() {
            [context, _ack] if context.kind == wire::REP_META_CONTEXT => context,
            other => return Err(Failure::Protocol(format!("contexts selected: {other:?}"))),
        };
        let (id, name) = context
            .data
            .split_at_checked(4)
            .ok_or(Failure::Protocol("short context reply".into()))?;
        if name != b"base:allocation" {
            return Err(Failure::Protocol(format!(
                "selected {:?}",
                String::from_utf8_lossy(name)
            )));
        }
        let id = u32::from_be_bytes([id[0], id[1], id[2], id[3]]);
        self.allocation = Some(id);
        Ok(id)
    }

    /// All that `NBD_OPT_INFO` or `NBD_OPT_GO` tells.
    pub fn infos(
        &mut self,
        option: u32,
        export: &str,
        wanted: &[u16],
    ) -> Result<Vec<Info>, Failure> {
        let replies = self.acknowledged(option, &export_request(export.as_bytes(), wanted))?;
        replies
            .iter()
            .filter(|reply| reply.kind == wire::REP_INFO)
            .map(|reply| Info::parse(&reply.data))
            .collect()
    }

    /// Enters transmission with `NBD_OPT_GO`.
    pub fn go(mut self, export: &str) -> Result<Transmission, Failure> {
        let wanted = [
            wire::INFO_NAME,
            wire::INFO_DESCRIPTION,
            wire::INFO_BLOCK_SIZE,
        ];
        let infos = self.infos(wire::OPT_GO, export, &wanted)?;
        let (size_bytes, flags) = infos
            .iter()
            .find_map(|info| match info {
                Info::Export { size_bytes, flags } => Some((*size_bytes, *flags)),
                _ => None,
            })
            .ok_or(Failure::Protocol("GO without INFO_EXPORT".into()))?;
        Ok(Transmission::new(
            self.connection,
            self.style,
            self.allocation,
            size_bytes,
            flags,
        ))
    }

    /// Enters transmission with `NBD_OPT_EXPORT_NAME`.
    pub fn export_name(mut self, export: &str) -> Result<Transmission, Failure> {
        self.send_option(wire::OPT_EXPORT_NAME, export.as_bytes())?;
        let (size_bytes, flags) = (self.connection.take_u64()?, self.connection.take_u16()?);
        if !self.no_zeroes {
            let zeroes = self.connection.take(124)?;
            if zeroes.iter().any(|byte| *byte != 0) {
                return Err(Failure::Protocol(
                    "the 124 reserved bytes are not zero".into(),
                ));
            }
        }
        Ok(Transmission::new(
            self.connection,
            self.style,
            self.allocation,
            size_bytes,
            flags,
        ))
    }
}
