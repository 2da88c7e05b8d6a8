//! The kernel's NBD driver in a virtual machine: attach, file systems, restarts of the daemon, power cuts. docs/testing.md says
//! which promise each module checks.

// The machines are x86-64, and so are the programs that are copied into them.
#![cfg(target_arch = "x86_64")]

mod by_hand;
mod csi;
mod load;
mod power;
mod restarts;

use ashlar_tests::scratch::Scratch;
use ashlar_tests::vm::{Disk, Machine, Plan};

const GIB: u64 = 1 << 30;

/// A machine with one empty disk, which goes with the returned directory.
fn machine(name: &str) -> (Machine, Scratch) {
    let scratch = Scratch::new("vm-disk");
    let disk = Disk::new(scratch.path(), "a", 4 * GIB);
    (Machine::boot(name, &Plan::default(), vec![disk]), scratch)
}
