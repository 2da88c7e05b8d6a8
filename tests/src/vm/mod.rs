//! Virtual machines for what the host's kernel cannot do: the real NBD driver, and power cuts.
//!
//! A machine is a Debian kernel under qemu's software emulation (no KVM needed), with everything it runs in an initramfs that is
//! made here from the host's own programs. In it, `vm-guest` (`tests/src/bin/vm-guest`) is the first process and does what the
//! test on the host asks of it. x86-64 only.

mod archive;
mod daemon;
mod disk;
mod image;
mod kernel;
mod machine;
pub mod wire;

use std::path::PathBuf;

pub use daemon::GuestDaemon;
pub use disk::Disk;
pub use machine::{Machine, Plan};

/// Cargo's target directory: a test runs from TARGET/PROFILE/deps.
fn target() -> PathBuf {
    let own = std::env::current_exe().expect("a test knows its own path");
    let target = own.ancestors().nth(3).expect("TARGET/PROFILE/deps");
    target.to_path_buf()
}
