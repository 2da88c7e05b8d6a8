//! The kernel's NBD driver by its netlink interface, as far as nbd-client does not reach it: a dead-connection timeout, new
//! sockets for a device that lost its own, and a new size.
//!
//! Numbers are those of the kernel's include/uapi/linux/nbd-netlink.h and genetlink.h. The handshake is the tests' own client's.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::net::netlink::{GENERIC, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};

use ashlar_tests::nbd::{self, Address, Transmission, Wishes};

use crate::{option, wanted};

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLA_F_NESTED: u16 = 0x8000;
const NLMSG_ERROR: u16 = 2;
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const CMD_CONNECT: u8 = 1;
const CMD_RECONFIGURE: u8 = 3;
const ATTR_INDEX: u16 = 1;
const ATTR_SIZE_BYTES: u16 = 2;
const ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const ATTR_TIMEOUT: u16 = 4;
const ATTR_SERVER_FLAGS: u16 = 5;
const ATTR_SOCKETS: u16 = 7;
const ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const ATTR_BACKEND_IDENTIFIER: u16 = 10;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;

/// Bytes of nlmsghdr and of genlmsghdr.
const HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;

pub(super) fn run(words: &[&str]) -> anyhow::Result<()> {
    let (command, rest) = words
        .split_first()
        .context("connect, reconnect or resize")?;
    let mut attributes = Attributes::default();
    attributes.u32(ATTR_INDEX, wanted(rest, "device")?);
    if let Some(id) = option(rest, "identifier") {
        attributes.bytes(ATTR_BACKEND_IDENTIFIER, &[id.as_bytes(), &[0]].concat());
    }
    // The sockets must live until the kernel has taken them.
    let mut sockets = Vec::new();
    if *command != "resize" {
        let connections: usize = wanted(rest, "connections")?;
        for _ in 0..connections {
            sockets.push(shake_hands(rest)?);
        }
        let size = sockets
            .first()
            .context("at least one connection")?
            .size_bytes;
        ensure!(
            sockets.iter().all(|one| one.size_bytes == size),
            "connections of two sizes"
        );
        attributes.sockets(&sockets);
    }
    match *command {
        "connect" => {
            attributes.u64(ATTR_SIZE_BYTES, sockets[0].size_bytes);
            attributes.u64(ATTR_BLOCK_SIZE_BYTES, 4096);
            attributes.u64(ATTR_SERVER_FLAGS, sockets[0].flags.into());
            attributes.u64(ATTR_TIMEOUT, wanted(rest, "timeout")?);
            attributes.u64(ATTR_DEAD_CONN_TIMEOUT, wanted(rest, "dead-timeout")?);
            Netlink::open()?.ask(CMD_CONNECT, &attributes)
        }
        "reconnect" => Netlink::open()?.ask(CMD_RECONFIGURE, &attributes),
        "resize" => {
            attributes.u64(ATTR_SIZE_BYTES, wanted(rest, "size")?);
            Netlink::open()?.ask(CMD_RECONFIGURE, &attributes)
        }
        other => bail!("{other}: connect, reconnect or resize"),
    }
}

fn shake_hands(words: &[&str]) -> anyhow::Result<Transmission> {
    let address = Address::Unix(PathBuf::from(wanted::<String>(words, "socket")?));
    let export: String = wanted(words, "export")?;
    let transmission = nbd::open(&address, &export, Wishes::SIMPLE)?;
    // The kernel obeys the limits that a socket brings, and would give up a connection that is idle for so long.
    for direction in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(transmission.connection.as_fd(), direction, None)?;
    }
    Ok(transmission)
}

/// Attributes of a message: length, kind, content, padded to 4 bytes each.
#[derive(Default)]
struct Attributes(Vec<u8>);

impl Attributes {
    fn bytes(&mut self, kind: u16, content: &[u8]) {
        self.0
            .extend_from_slice(&(content.len() as u16 + 4).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn u32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_ne_bytes());
    }

    fn u64(&mut self, kind: u16, value: u64) {
        self.bytes(kind, &value.to_ne_bytes());
    }

    fn sockets(&mut self, sockets: &[Transmission]) {
        let mut list = Attributes::default();
        for one in sockets {
            let mut item = Attributes::default();
            item.u32(SOCK_FD, one.connection.as_fd().as_raw_fd() as u32);
            list.bytes(SOCK_ITEM | NLA_F_NESTED, &item.0);
        }
        self.bytes(ATTR_SOCKETS | NLA_F_NESTED, &list.0);
    }
}

/// A generic netlink socket and the number under which the driver answers there.
struct Netlink {
    socket: OwnedFd,
    family: u16,
}

impl Netlink {
    fn open() -> anyhow::Result<Netlink> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(GENERIC),
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(120)))?;
        let mut netlink = Netlink {
            socket,
            family: GENL_ID_CTRL,
        };
        let mut attributes = Attributes::default();
        attributes.bytes(CTRL_ATTR_FAMILY_NAME, b"nbd\0");
        netlink.send(CTRL_CMD_GETFAMILY, NLM_F_REQUEST, &attributes)?;
        let (kind, body) = netlink.receive()?;
        ensure!(kind != NLMSG_ERROR, "no family nbd: is the module loaded?");
        netlink.family = attribute(&body[GENERIC_HEADER..], CTRL_ATTR_FAMILY_ID)
            .and_then(|value| Some(u16::from_ne_bytes(value.get(..2)?.try_into().ok()?)))
            .context("a family without a number")?;
        Ok(netlink)
    }

    fn send(&self, command: u8, flags: u16, attributes: &Attributes) -> anyhow::Result<()> {
        let length = HEADER + GENERIC_HEADER + attributes.0.len();
        let mut message = (length as u32).to_ne_bytes().to_vec();
        message.extend_from_slice(&self.family.to_ne_bytes());
        message.extend_from_slice(&flags.to_ne_bytes());
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(&[command, 1, 0, 0]);
        message.extend_from_slice(&attributes.0);
        send(&self.socket, &message, SendFlags::empty())?;
        Ok(())
    }

    /// Kind and body of the next message.
    fn receive(&self) -> anyhow::Result<(u16, Vec<u8>)> {
        let mut message = vec![0; 1 << 16];
        let (_, count) = recv(&self.socket, &mut message[..], RecvFlags::empty())?;
        ensure!(count >= HEADER, "a message of {count} bytes");
        let length = u32::from_ne_bytes(message[..4].try_into()?) as usize;
        ensure!(
            (HEADER..=count).contains(&length),
            "a message that says {length} of {count} bytes"
        );
        let kind = u16::from_ne_bytes(message[4..6].try_into()?);
        Ok((kind, message[HEADER..length].to_vec()))
    }

    /// Asks for something and waits until the kernel says that it is done.
    fn ask(&self, command: u8, attributes: &Attributes) -> anyhow::Result<()> {
        self.send(command, NLM_F_REQUEST | NLM_F_ACK, attributes)?;
        loop {
            let (kind, body) = self.receive()?;
            if kind == NLMSG_ERROR {
                let code =
                    i32::from_ne_bytes(body.get(..4).context("an answer cut short")?.try_into()?);
                ensure!(code == 0, std::io::Error::from_raw_os_error(-code));
                return Ok(());
            }
        }
    }
}

/// The content of the attribute `kind` in a list.
fn attribute(mut list: &[u8], kind: u16) -> Option<&[u8]> {
    while list.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([list[0], list[1]]));
        let found = u16::from_ne_bytes([list[2], list[3]]);
        if length < 4 || length > list.len() {
            return None;
        }
        if found == kind {
            return Some(&list[4..length]);
        }
        list = list.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}
