//! The doing half of Ashlar: sockets, disks, metadata and the interfaces people use.

pub mod cli;
pub mod config;
pub mod data;
pub mod engine;
pub mod meta;
pub mod metrics;
pub mod nbd;
pub mod offline;
pub mod tail;
pub mod volumes;
