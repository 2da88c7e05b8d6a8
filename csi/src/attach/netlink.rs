//! The kernel's NBD driver as it is told by generic netlink: family `nbd`, version 1
//! (linux: include/uapi/linux/nbd-netlink.h, drivers/block/nbd.c).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, sendto, socket_with,
    sockopt,
};

const HEADER_BYTES: usize = 16;
const GENERIC_HEADER_BYTES: usize = 4;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST_ACK: u16 = 0x5;
const MESSAGE_ERROR: u16 = 2;
const CONTROL_FAMILY: u16 = 0x10;
const CONTROL_GET_FAMILY: u8 = 3;
const CONTROL_FAMILY_ID: u16 = 1;
const CONTROL_FAMILY_NAME: u16 = 2;
const FAMILY: &str = "nbd";
const FAMILY_VERSION: u8 = 1;
/// How long an answer is waited for that was lost. The kernel does the work before the *send* returns, so this bounds none
/// of it, and a send cannot be bounded: whoever asks waits on another thread ([`super::asks`]).
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;

const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const CLIENT_FLAGS: u16 = 6;
const SOCKETS: u16 = 7;
const DEAD_CONN_TIMEOUT: u16 = 8;
const BACKEND_IDENTIFIER: u16 = 10;
const SOCKET_ITEM: u16 = 1;
const SOCKET_FD: u16 = 1;

/// What a device is set up with.
#[derive(Debug)]
pub struct Setup<'a> {
    /// Which device; `None` takes a free one.
    pub index: Option<u32>,
    /// Its size.
    pub size_bytes: u64,
    /// Its logical block.
    pub block_bytes: u32,
    /// After how long a request is taken for lost and sent again.
    pub request_timeout: Duration,
    /// How long requests wait for a new connection before they fail.
    pub dead_connection_timeout: Duration,
    /// Transmission flags of the export.
    pub flags: u16,
    /// What the device is known by in `/sys/block/nbdN/backend`.
    pub identifier: &'a str,
    /// Connections in transmission. The kernel keeps its own reference.
    pub sockets: &'a [OwnedFd],
}

/// A netlink socket bound to the NBD family.
#[derive(Debug)]
pub struct Nbd {
    socket: OwnedFd,
    family: u16,
}

impl Nbd {
    /// Errors with [`io::ErrorKind::NotFound`] when the kernel has no NBD driver loaded.
    pub fn open() -> io::Result<Nbd> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(netlink::GENERIC),
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(ANSWER_LIMIT))?;
        let mut name = FAMILY.as_bytes().to_vec();
        name.push(0);
        let mut attributes = Vec::new();
        attribute(&mut attributes, CONTROL_FAMILY_NAME, &name);
        let answer = exchange(
            socket.as_fd(),
            &message(CONTROL_FAMILY, CONTROL_GET_FAMILY, 2, &attributes),
        )?;
        let family = find(&answer, CONTROL_FAMILY_ID)
            .and_then(|value| value.first_chunk::<2>())
            .map(|bytes| u16::from_ne_bytes(*bytes))
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(Nbd { socket, family })
    }

    /// Sets a device up. Returns its index.
    pub fn connect(&self, setup: &Setup<'_>) -> io::Result<u32> {
        let answer = self.ask(CONNECT, &connect_attributes(setup))?;
        find(&answer, INDEX)
            .and_then(|value| value.first_chunk::<4>())
            .map(|bytes| u32::from_ne_bytes(*bytes))
            .or(setup.index)
            .ok_or_else(|| io::Error::other("the kernel did not say which device it took"))
    }

    /// Gives a device new connections in the place of dead ones. The kernel takes no notice of a socket when none is
    /// dead, and says success all the same.
    pub fn replace_sockets(
        &self,
        index: u32,
        identifier: &str,
        sockets: &[OwnedFd],
    ) -> io::Result<()> {
        let mut attributes = target(index);
        identify(&mut attributes, identifier);
        socket_list(&mut attributes, sockets);
        self.ask(RECONFIGURE, &attributes).map(drop)
    }

    /// Makes a device larger. Waits for the requests in flight, with every other ask of generic netlink behind it (Linux 6.9
    /// and later freeze the queue under its lock): never to be asked while requests wait for a new connection, which is
    /// given by netlink too.
    pub fn resize(&self, index: u32, identifier: &str, size_bytes: u64) -> io::Result<()> {
        let mut attributes = target(index);
        identify(&mut attributes, identifier);
        attribute(&mut attributes, SIZE_BYTES, &size_bytes.to_ne_bytes());
        self.ask(RECONFIGURE, &attributes).map(drop)
    }

    /// Ends all requests with an error and lets the device go as soon as nobody has it open.
    pub fn disconnect(&self, index: u32) -> io::Result<()> {
        self.ask(DISCONNECT, &target(index)).map(drop)
    }

    fn ask(&self, command: u8, attributes: &[u8]) -> io::Result<Vec<u8>> {
        exchange(
            self.socket.as_fd(),
            &message(self.family, command, FAMILY_VERSION, attributes),
        )
    }
}

fn connect_attributes(setup: &Setup<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    if let Some(index) = setup.index {
        attribute(&mut out, INDEX, &index.to_ne_bytes());
    }
    let mut number = |kind: u16, value: u64| attribute(&mut out, kind, &value.to_ne_bytes());
    number(SIZE_BYTES, setup.size_bytes);
    number(BLOCK_SIZE_BYTES, u64::from(setup.block_bytes));
    number(TIMEOUT, setup.request_timeout.as_secs());
    number(DEAD_CONN_TIMEOUT, setup.dead_connection_timeout.as_secs());
    number(SERVER_FLAGS, u64::from(setup.flags));
    // Neither destroyed nor disconnected when this program ends.
    number(CLIENT_FLAGS, 0);
    identify(&mut out, setup.identifier);
    socket_list(&mut out, setup.sockets);
    out
}

fn target(index: u32) -> Vec<u8> {
    let mut out = Vec::new();
    attribute(&mut out, INDEX, &index.to_ne_bytes());
    out
}

fn identify(out: &mut Vec<u8>, identifier: &str) {
    let mut text = identifier.as_bytes().to_vec();
    text.push(0);
    attribute(out, BACKEND_IDENTIFIER, &text);
}

fn socket_list(out: &mut Vec<u8>, sockets: &[OwnedFd]) {
    let mut items = Vec::new();
    for socket in sockets {
        let mut item = Vec::new();
        attribute(&mut item, SOCKET_FD, &socket.as_raw_fd().to_ne_bytes());
        attribute(&mut items, SOCKET_ITEM | NESTED, &item);
    }
    attribute(out, SOCKETS | NESTED, &items);
}

/// `struct nlattr`: length without padding, type, value, padding to 4 bytes.
fn attribute(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = ATTRIBUTE_HEADER_BYTES + value.len();
    out.extend_from_slice(&u16::try_from(length).unwrap_or(u16::MAX).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// `struct nlmsghdr`, `struct genlmsghdr`, attributes. One request is under way on a socket at a time, so the sequence
/// number may stay the same.
fn message(family: u16, command: u8, version: u8, attributes: &[u8]) -> Vec<u8> {
    let length = HEADER_BYTES + GENERIC_HEADER_BYTES + attributes.len();
    let mut out = Vec::with_capacity(length);
    out.extend_from_slice(&(length as u32).to_ne_bytes());
    out.extend_from_slice(&family.to_ne_bytes());
    out.extend_from_slice(&REQUEST_ACK.to_ne_bytes());
    out.extend_from_slice(&1u32.to_ne_bytes());
    out.extend_from_slice(&0u32.to_ne_bytes());
    out.extend_from_slice(&[command, version, 0, 0]);
    out.extend_from_slice(attributes);
    out
}

/// Sends a request and collects the attributes of the answer up to the acknowledgement.
fn exchange(socket: BorrowedFd<'_>, request: &[u8]) -> io::Result<Vec<u8>> {
    sendto(
        socket,
        request,
        SendFlags::empty(),
        &SocketAddrNetlink::new(0, 0),
    )?;
    let mut attributes = Vec::new();
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let (length, _) = recv(socket, &mut buffer[..], RecvFlags::empty())?;
        match take(&buffer[..length], &mut attributes)? {
            Progress::Done => return Ok(attributes),
            Progress::More => {}
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    More,
    Done,
}

/// Reads the messages of one datagram.
fn take(mut datagram: &[u8], attributes: &mut Vec<u8>) -> io::Result<Progress> {
    let short = || io::Error::new(io::ErrorKind::InvalidData, "a netlink message cut short");
    while !datagram.is_empty() {
        let header: &[u8; HEADER_BYTES] = datagram.first_chunk().ok_or_else(short)?;
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let body = datagram.get(HEADER_BYTES..length).ok_or_else(short)?;
        if kind == MESSAGE_ERROR {
            let code: &[u8; 4] = body.first_chunk().ok_or_else(short)?;
            return match i32::from_ne_bytes(*code) {
                0 => Ok(Progress::Done),
                code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
            };
        }
        attributes.extend_from_slice(body.get(GENERIC_HEADER_BYTES..).ok_or_else(short)?);
        attributes.resize(attributes.len().next_multiple_of(4), 0);
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(Progress::More)
}

/// The value of the first attribute of a kind.
fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let Some(header) = attributes.first_chunk::<ATTRIBUTE_HEADER_BYTES>() {
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK;
        let value = attributes.get(ATTRIBUTE_HEADER_BYTES..length)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    #[test]
    fn a_connect_has_the_bytes_of_the_header_file() {
        let sockets = [OwnedFd::from(
            std::fs::File::open("/dev/null").expect("there is one"),
        )];
        let fd = sockets[0].as_raw_fd().to_le_bytes();
        let setup = Setup {
            index: Some(5),
            size_bytes: 1 << 30,
            block_bytes: 4096,
            request_timeout: Duration::from_secs(15),
            dead_connection_timeout: Duration::from_secs(86400),
            flags: 0x10d,
            identifier: "v",
            sockets: &sockets,
        };
        let attributes = connect_attributes(&setup);
        let mut wanted: Vec<u8> = vec![8, 0, 1, 0, 5, 0, 0, 0];
        wanted.extend([12, 0, 2, 0, 0, 0, 0, 0x40, 0, 0, 0, 0]);
        wanted.extend([12, 0, 3, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]);
        wanted.extend([12, 0, 4, 0, 15, 0, 0, 0, 0, 0, 0, 0]);
        wanted.extend([12, 0, 8, 0, 0x80, 0x51, 1, 0, 0, 0, 0, 0]);
        wanted.extend([12, 0, 5, 0, 0x0d, 1, 0, 0, 0, 0, 0, 0]);
        wanted.extend([12, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        wanted.extend([6, 0, 10, 0, b'v', 0, 0, 0]);
        wanted.extend([16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0]);
        wanted.extend(fd);
        assert_eq!(attributes, wanted);
        let message = message(0x1c, CONNECT, 1, &attributes);
        assert_eq!(message[..4], (message.len() as u32).to_le_bytes());
        assert_eq!(
            message[4..20],
            [0x1c, 0, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0]
        );
        assert_eq!(
            find(&attributes, SIZE_BYTES),
            Some(&(1u64 << 30).to_le_bytes()[..])
        );
        assert_eq!(find(&attributes, 9), None);
    }

    #[test]
    fn answers_are_read_and_nonsense_is_refused() {
        let mut body = vec![CONNECT, 1, 0, 0];
        attribute(&mut body, INDEX, &7u32.to_le_bytes());
        let mut datagram = ((HEADER_BYTES + body.len()) as u32).to_le_bytes().to_vec();
        datagram.extend([0x1c, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        datagram.extend(&body);
        let mut attributes = Vec::new();
        assert_eq!(
            take(&datagram, &mut attributes).expect("read"),
            Progress::More
        );
        assert_eq!(find(&attributes, INDEX), Some(&[7, 0, 0, 0][..]));
        let error = |code: i32| {
            let mut bytes = 36u32.to_le_bytes().to_vec();
            bytes.extend([2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
            bytes.extend(code.to_le_bytes());
            bytes.extend([0; 16]);
            bytes
        };
        assert_eq!(
            take(&error(0), &mut attributes).expect("ack"),
            Progress::Done
        );
        let refused = take(&error(-16), &mut attributes).expect_err("refused");
        assert_eq!(refused.raw_os_error(), Some(16));
        for length in 1..datagram.len() {
            assert!(
                take(&datagram[..length], &mut Vec::new()).is_err(),
                "{length}"
            );
        }
        let mut endless = datagram.clone();
        endless[0] = 3;
        assert!(take(&endless, &mut Vec::new()).is_err());
        assert_eq!(find(&[0, 0, 1, 0, 1, 1, 1, 1], 5), None);
    }

    #[test]
    fn the_control_family_answers_for_a_family_that_is_there() {
        // `nlctrl` is in every kernel; `nbd` may not be, and then that is said.
        match Nbd::open() {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}"),
        }
    }
}
