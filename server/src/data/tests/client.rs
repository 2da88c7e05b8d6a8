//! A client on a socket pair.

use super::*;

/// A client that has its handshake behind it.
pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    pub(crate) style: ReplyStyle,
    pub(crate) cookie: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Ok(Vec<u8>),
    Err(u32),
}

impl Client {
    pub(crate) fn attach(plane: &DataPlane, style: ReplyStyle, size_bytes: u64) -> Client {
        Client::attach_by(plane, style, size_bytes, None)
    }

    pub(crate) fn attach_by(
        plane: &DataPlane,
        style: ReplyStyle,
        size_bytes: u64,
        token: Option<ExportToken>,
    ) -> Client {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        ours.set_read_timeout(Some(Duration::from_secs(60)))
            .expect("timeout");
        let session = Session {
            volume: VOLUME,
            style,
            base_allocation: true,
            read_only: false,
            token,
            size_bytes,
        };
        let slot = ConnectionCount::new(100).try_slot().expect("slot");
        let client = AttachedClient {
            stream: Stream::Plain(theirs.into()),
            session,
            leftover: Vec::new(),
            peer: "test".to_owned(),
            certified: None,
            slot,
        };
        plane.attach(client).expect("attach");
        Client {
            stream: ours,
            style,
            cookie: 0,
        }
    }

    pub(crate) fn encode(
        &mut self,
        out: &mut Vec<u8>,
        command: u16,
        flags: u16,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> u64 {
        self.cookie += 1;
        let flags = if command == command::WRITE && self.style == ReplyStyle::Extended {
            flags | command_flag::PAYLOAD_LEN
        } else {
            flags
        };
        encode(
            self.style,
            &RawRequest {
                flags,
                command,
                cookie: self.cookie,
                offset,
                length,
            },
            out,
        );
        out.extend_from_slice(payload);
        self.cookie
    }

    pub(crate) fn send(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> u64 {
        let mut out = Vec::new();
        let cookie = self.encode(&mut out, command, flags, offset, length, payload);
        self.stream.write_all(&out).expect("send");
        cookie
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().expect("two"))
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().expect("four"))
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().expect("eight"))
    }

    pub(crate) fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).expect("receive");
        bytes
    }

    /// The next whole reply. `read_len`: the length of the request if it was a READ at `offset`.
    pub(crate) fn reply(&mut self, offset: u64, read_len: Option<usize>) -> (u64, Reply) {
        let mut data = vec![0xEE; read_len.unwrap_or(0)];
        let mut error = None;
        loop {
            let magic = self.u32();
            if magic == 0x6744_6698 {
                let code = self.u32();
                let cookie = self.u64();
                if code != 0 {
                    return (cookie, Reply::Err(code));
                }
                if let (ReplyStyle::Simple, Some(len)) = (self.style, read_len) {
                    data = self.take(len);
                }
                return (cookie, Reply::Ok(data));
            }
            let (flags, kind) = (self.u16(), self.u16());
            let cookie = self.u64();
            let length = match magic {
                0x668e_33ef => u64::from(self.u32()),
                0x6e8a_278c => {
                    assert_eq!(self.u64(), offset);
                    self.u64()
                }
                other => panic!("reply magic {other:#x}"),
            } as usize;
            match kind {
                0 => assert_eq!(length, 0),
                1 => {
                    let at = (self.u64() - offset) as usize;
                    let bytes = self.take(length - 8);
                    assert!(data[at..at + bytes.len()].iter().all(|b| *b == 0xEE));
                    data[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                2 => {
                    let at = (self.u64() - offset) as usize;
                    let len = self.u32() as usize;
                    data[at..at + len].fill(0);
                }
                5 | 6 => data = self.take(length),
                0x8001 => {
                    error = Some(self.u32());
                    let len = self.u16() as usize;
                    assert!(len > 0 && len + 6 == length);
                    self.take(len);
                }
                other => panic!("chunk type {other}"),
            }
            if flags & 1 == 1 {
                return (cookie, error.map_or(Reply::Ok(data), Reply::Err));
            }
        }
    }

    pub(crate) fn call(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> Reply {
        let cookie = self.send(command, flags, offset, length, payload);
        let read = (command == command::READ).then_some(length as usize);
        let (got, reply) = self.reply(offset, read);
        assert_eq!(got, cookie);
        reply
    }

    pub(crate) fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
        match self.call(command::READ, 0, offset, length, &[]) {
            Reply::Ok(data) => data,
            Reply::Err(code) => panic!("read at {offset}: error {code}"),
        }
    }

    pub(crate) fn write(&mut self, flags: u16, offset: u64, payload: &[u8]) {
        assert_eq!(
            self.call(command::WRITE, flags, offset, payload.len() as u64, payload),
            Reply::Ok(vec![]),
            "write at {offset}"
        );
    }

    pub(crate) fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}
