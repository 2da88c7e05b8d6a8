//! The doing half of Ashlar: sockets, disks, metadata and the interfaces people use.

pub mod engine;
pub mod meta;
