//! The first process of a machine: prepares what programs expect, starts the agent and buries the dead.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::process::Command;

use anyhow::{Context, bail, ensure};
use rustix::process::{WaitOptions, wait};

/// File systems of a running system.
const MOUNTS: [(&str, &str, &str); 7] = [
    ("proc", "/proc", "proc"),
    ("sysfs", "/sys", "sysfs"),
    ("devtmpfs", "/dev", "devtmpfs"),
    ("tmpfs", "/run", "tmpfs"),
    ("tmpfs", "/tmp", "tmpfs"),
    ("devpts", "/dev/pts", "devpts"),
    ("tmpfs", "/dev/shm", "tmpfs"),
];
/// What the agent and the disks need. The NBD driver is left to the tests, as it is to an administrator.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_console", "virtio_blk", "crc32c_intel"];

pub(super) fn run() -> anyhow::Result<()> {
    for (source, target, kind) in MOUNTS {
        std::fs::create_dir_all(target).with_context(|| target.to_owned())?;
        tool("mount", &["-t", kind, source, target])?;
    }
    // Programs that look for descriptors by name want these.
    for (name, target) in [("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0")] {
        std::os::unix::fs::symlink(target, format!("/dev/{name}"))?;
    }
    loopback_up().context("the loopback interface")?;
    tool("modprobe", &[&["-a"], &MODULES[..]].concat())?;
    let agent = Command::new("/usr/bin/vm-guest")
        .arg("agent")
        .env("PATH", "/usr/bin:/usr/sbin")
        .env("HOME", "/")
        .env("LC_ALL", "C")
        .spawn()?
        .id();
    loop {
        // Every orphan becomes a child of this process.
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid.as_raw_nonzero().get() as u32 == agent => {
                bail!("the agent ended: {status:?}")
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn tool(name: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let status = Command::new(name)
        .args(arguments)
        .env("PATH", "/usr/bin:/usr/sbin")
        .status()
        .with_context(|| name.to_owned())?;
    ensure!(status.success(), "{name} {arguments:?}: {status}");
    Ok(())
}

/// 127.0.0.1 answers only once its interface is up.
fn loopback_up() -> anyhow::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: ifreq is plain data for which all zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives through the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    ensure!(done == 0, std::io::Error::last_os_error());
    Ok(())
}
