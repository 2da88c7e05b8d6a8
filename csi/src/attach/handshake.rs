//! The client's half of the NBD handshake, up to the point where the kernel takes the socket over.
//!
//! Fixed newstyle, `NBD_OPT_GO`, simple replies: what the Linux driver speaks (NetworkBlockDevice/nbd doc/proto.md and
//! drivers/block/nbd.c).

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::address::Address;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;
const OPT_ABORT: u32 = 2;
const OPT_GO: u32 = 7;
const OPT_INFO: u32 = 6;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;
const ERR_PLATFORM: u32 = REP_ERROR + 4;
const ERR_UNKNOWN: u32 = REP_ERROR + 6;
const ERR_SHUTDOWN: u32 = REP_ERROR + 7;
const ERR_POLICY: u32 = REP_ERROR + 2;
const ERR_TLS_REQUIRED: u32 = REP_ERROR + 5;
const INFO_EXPORT: u16 = 0;
const INFO_DESCRIPTION: u16 = 2;
const INFO_BLOCK_SIZE: u16 = 3;
/// Longest answer to an option that is read: an error text is at most 4096 bytes.
const REPLY_BYTES_MAX: u32 = 8192;
/// Most information replies to one option.
const REPLIES_MAX: usize = 64;
/// A daemon answers a handshake at once; one that is recovering its stores does not listen yet.
const LIMIT: Duration = Duration::from_secs(10);

/// `NBD_FLAG_READ_ONLY`.
pub const READ_ONLY: u16 = 1 << 1;
/// `NBD_FLAG_CAN_MULTI_CONN`: flushes count for all connections, so more than one is safe.
pub const CAN_MULTI_CONN: u16 = 1 << 8;

/// What the server says of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its size.
    pub size_bytes: u64,
    /// Transmission flags.
    pub flags: u16,
    /// What it is, in words: the daemon says which volume. Empty when the server says nothing.
    pub description: String,
}

/// Why there is no connection to an export.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// Nobody there, gone half-way, or not serving this export now.
    #[error("{address}: {source}")]
    Unreachable {
        /// Where it was tried.
        address: Address,
        /// The system's reason.
        source: io::Error,
    },
    /// The server does not serve this export, or no longer: a publication that was withdrawn is answered so.
    #[error("{address} does not serve this export: {message}")]
    Refused {
        /// Which server.
        address: Address,
        /// Its words.
        message: String,
    },
    /// The server wants TLS, which the kernel's client cannot do.
    #[error(
        "{address} wants TLS, which the kernel's client cannot speak; attach through a Unix socket"
    )]
    WantsTls {
        /// Which server.
        address: Address,
    },
    /// It does not speak NBD as it should.
    #[error("{address}: {message}")]
    Protocol {
        /// Which server.
        address: Address,
        /// What is wrong.
        message: String,
    },
}

/// A connection that is in transmission, blocking, with nothing read ahead.
#[derive(Debug)]
pub struct Connection {
    /// What the server said.
    pub info: ExportInfo,
    /// The socket.
    pub socket: OwnedFd,
}

/// Opens `export` at `address` and enters transmission.
pub async fn connect(address: &Address, export: &str) -> Result<Connection, HandshakeError> {
    within(address, async {
        match address {
            Address::Unix(path) => {
                let mut stream = UnixStream::connect(path).await?;
                let info = negotiate(&mut stream, export, OPT_GO).await?;
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                let socket = OwnedFd::from(stream);
                Ok(Connection { info, socket })
            }
            Address::Tcp(host) => {
                let mut stream = TcpStream::connect(host.as_str()).await?;
                stream.set_nodelay(true)?;
                let info = negotiate(&mut stream, export, OPT_GO).await?;
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                let socket = OwnedFd::from(stream);
                Ok(Connection { info, socket })
            }
        }
    })
    .await
}

/// Asks about `export` at `address` without opening it.
pub async fn look(address: &Address, export: &str) -> Result<ExportInfo, HandshakeError> {
    within(address, async {
        match address {
            Address::Unix(path) => {
                let mut stream = UnixStream::connect(path).await?;
                let info = negotiate(&mut stream, export, OPT_INFO).await?;
                leave(&mut stream).await;
                Ok(info)
            }
            Address::Tcp(host) => {
                let mut stream = TcpStream::connect(host.as_str()).await?;
                let info = negotiate(&mut stream, export, OPT_INFO).await?;
                leave(&mut stream).await;
                Ok(info)
            }
        }
    })
    .await
}

/// What goes wrong inside, before the address is known.
#[derive(Debug)]
enum Fault {
    Io(io::Error),
    Refused(String),
    WantsTls,
    Protocol(String),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Fault {
        Fault::Io(error)
    }
}

async fn within<T>(
    address: &Address,
    work: impl Future<Output = Result<T, Fault>>,
) -> Result<T, HandshakeError> {
    let address = || address.clone();
    match tokio::time::timeout(LIMIT, work).await {
        Err(_) => Err(HandshakeError::Unreachable {
            address: address(),
            source: io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no handshake within {} s", LIMIT.as_secs()),
            ),
        }),
        Ok(Ok(done)) => Ok(done),
        Ok(Err(Fault::Io(source))) => Err(HandshakeError::Unreachable {
            address: address(),
            source,
        }),
        Ok(Err(Fault::Refused(message))) => Err(HandshakeError::Refused {
            address: address(),
            message,
        }),
        Ok(Err(Fault::WantsTls)) => Err(HandshakeError::WantsTls { address: address() }),
        Ok(Err(Fault::Protocol(message))) => Err(HandshakeError::Protocol {
            address: address(),
            message,
        }),
    }
}

async fn negotiate<S>(stream: &mut S, export: &str, option: u32) -> Result<ExportInfo, Fault>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if stream.read_u64().await? != MAGIC || stream.read_u64().await? != OPTION_MAGIC {
        return Err(Fault::Protocol(
            "this is no NBD server of the newer style".into(),
        ));
    }
    let offered = stream.read_u16().await?;
    if offered & FIXED_NEWSTYLE == 0 {
        return Err(Fault::Protocol("the server cannot answer options".into()));
    }
    let flags = offered & (FIXED_NEWSTYLE | NO_ZEROES);
    stream.write_u32(u32::from(flags)).await?;
    stream.write_all(&request(export, option)?).await?;
    stream.flush().await?;
    answer(stream, option).await
}

fn request(export: &str, option: u32) -> Result<Vec<u8>, Fault> {
    // The protocol's bound on strings.
    if export.len() > 4096 {
        return Err(Fault::Protocol("the export's name is too long".into()));
    }
    let mut data = Vec::with_capacity(export.len() + 8);
    data.extend_from_slice(&(export.len() as u32).to_be_bytes());
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&2u16.to_be_bytes());
    data.extend_from_slice(&INFO_DESCRIPTION.to_be_bytes());
    // Asking for the block sizes promises to keep to them; the kernel sends whole 4096-byte blocks.
    data.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
    let mut message = Vec::with_capacity(data.len() + 16);
    message.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    message.extend_from_slice(&option.to_be_bytes());
    message.extend_from_slice(&(data.len() as u32).to_be_bytes());
    message.extend_from_slice(&data);
    Ok(message)
}

async fn answer<S: AsyncRead + Unpin>(stream: &mut S, option: u32) -> Result<ExportInfo, Fault> {
    let mut export = None;
    let mut description = String::new();
    for _ in 0..REPLIES_MAX {
        if stream.read_u64().await? != REPLY_MAGIC || stream.read_u32().await? != option {
            return Err(Fault::Protocol("an answer to something else".into()));
        }
        let kind = stream.read_u32().await?;
        let length = stream.read_u32().await?;
        if length > REPLY_BYTES_MAX {
            return Err(Fault::Protocol(format!("an answer of {length} bytes")));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data).await?;
        match kind {
            REP_ACK => {
                let (size_bytes, flags) = export
                    .ok_or_else(|| Fault::Protocol("no size in the server's answer".into()))?;
                return Ok(ExportInfo {
                    size_bytes,
                    flags,
                    description,
                });
            }
            REP_INFO if data.len() >= 2 => match u16::from_be_bytes([data[0], data[1]]) {
                INFO_EXPORT => export = Some(size_and_flags(&data[2..])?),
                INFO_DESCRIPTION => {
                    description = String::from_utf8_lossy(&data[2..]).into_owned();
                }
                _ => {}
            },
            ERR_UNKNOWN | ERR_POLICY => {
                return Err(Fault::Refused(
                    String::from_utf8_lossy(&data).chars().take(300).collect(),
                ));
            }
            ERR_PLATFORM | ERR_SHUTDOWN => {
                return Err(Fault::Io(io::Error::other(
                    String::from_utf8_lossy(&data).into_owned(),
                )));
            }
            ERR_TLS_REQUIRED => return Err(Fault::WantsTls),
            kind => {
                return Err(Fault::Protocol(format!(
                    "answer {kind:#x} {}",
                    String::from_utf8_lossy(&data)
                )));
            }
        }
    }
    Err(Fault::Protocol("no end of answers".into()))
}

fn size_and_flags(data: &[u8]) -> Result<(u64, u16), Fault> {
    let fields: [u8; 10] = data
        .try_into()
        .map_err(|_| Fault::Protocol("an export's information of a wrong length".into()))?;
    let (size, flags) = fields.split_at(8);
    Ok((
        u64::from_be_bytes(size.try_into().unwrap_or_default()),
        u16::from_be_bytes(flags.try_into().unwrap_or_default()),
    ))
}

/// Says good-bye, so that the server does not take the end for a fault. Nobody waits for its answer.
async fn leave<S: AsyncWrite + Unpin>(stream: &mut S) {
    let mut message = Vec::with_capacity(16);
    message.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    message.extend_from_slice(&OPT_ABORT.to_be_bytes());
    message.extend_from_slice(&0u32.to_be_bytes());
    let _ = stream.write_all(&message).await;
    let _ = stream.flush().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    fn greeting() -> Vec<u8> {
        let mut bytes = MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&3u16.to_be_bytes());
        bytes
    }

    fn export(size: u64, flags: u16) -> Vec<u8> {
        let mut data = INFO_EXPORT.to_be_bytes().to_vec();
        data.extend_from_slice(&size.to_be_bytes());
        data.extend_from_slice(&flags.to_be_bytes());
        data
    }

    /// What the client makes of a server that says exactly `bytes`, and what it sent.
    async fn met_with(bytes: &[u8]) -> (Result<ExportInfo, Fault>, Vec<u8>) {
        let (mut ours, mut theirs) = tokio::io::duplex(64 << 10);
        theirs.write_all(bytes).await.expect("room");
        let result = negotiate(&mut ours, "vol@token", OPT_GO).await;
        drop(ours);
        let mut sent = Vec::new();
        theirs.read_to_end(&mut sent).await.expect("readable");
        (result, sent)
    }

    #[tokio::test]
    async fn an_export_is_opened_by_its_whole_name() {
        let mut bytes = greeting();
        bytes.extend(reply(
            OPT_GO,
            REP_INFO,
            &[0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0],
        ));
        bytes.extend(reply(OPT_GO, REP_INFO, b"\0\x02Ashlar volume"));
        bytes.extend(reply(OPT_GO, REP_INFO, &export(8192, 0x101)));
        bytes.extend(reply(OPT_GO, REP_ACK, &[]));
        let (result, sent) = met_with(&bytes).await;
        let info = result.expect("served");
        assert_eq!((info.size_bytes, info.flags), (8192, 0x101));
        assert_eq!(info.description, "Ashlar volume");
        let mut wanted = 3u32.to_be_bytes().to_vec();
        wanted.extend_from_slice(b"IHAVEOPT");
        wanted.extend_from_slice(&[0, 0, 0, 7, 0, 0, 0, 19, 0, 0, 0, 9]);
        wanted.extend_from_slice(b"vol@token");
        wanted.extend_from_slice(&[0, 2, 0, 2, 0, 3]);
        assert_eq!(sent, wanted);
    }

    #[tokio::test]
    async fn refusals_and_nonsense_are_told_apart() {
        let after = |tail: &[u8]| [greeting(), tail.to_vec()].concat();
        let (result, _) = met_with(&after(&reply(OPT_GO, ERR_UNKNOWN, b"no such export"))).await;
        assert!(matches!(result, Err(Fault::Refused(text)) if text == "no such export"));
        // Its store is being opened, or the daemon goes away: later it may be there.
        for later in [ERR_PLATFORM, ERR_SHUTDOWN] {
            let (result, _) = met_with(&after(&reply(OPT_GO, later, b"later"))).await;
            assert!(matches!(result, Err(Fault::Io(_))), "{result:?}");
        }
        let (result, _) = met_with(&after(&reply(OPT_GO, ERR_TLS_REQUIRED, b""))).await;
        assert!(matches!(result, Err(Fault::WantsTls)));
        for nonsense in [
            b"SSH-2.0-OpenSSH_9.2p1 Debian".to_vec(),
            after(&reply(OPT_INFO, REP_ACK, b"")),
            after(&reply(OPT_GO, REP_ACK, b"")),
            after(&reply(OPT_GO, REP_INFO, &[0, 0, 1])),
            after(&reply(OPT_GO, 77, b"")),
            [
                greeting(),
                reply(OPT_GO, REP_INFO, &export(1, 1)).repeat(REPLIES_MAX),
            ]
            .concat(),
        ] {
            let (result, _) = met_with(&nonsense).await;
            assert!(matches!(result, Err(Fault::Protocol(_))), "{result:?}");
        }
        let mut long = greeting();
        long.extend(REPLY_MAGIC.to_be_bytes());
        long.extend(OPT_GO.to_be_bytes());
        long.extend(REP_INFO.to_be_bytes());
        long.extend(u32::MAX.to_be_bytes());
        assert!(matches!(met_with(&long).await.0, Err(Fault::Protocol(_))));
    }
}
