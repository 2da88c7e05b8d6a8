//! The doing half of Ashlar: sockets, disks, metadata and the interfaces people use.

/// Version of this software.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

pub mod admin;
pub mod cli;
pub mod config;
pub mod controller;
pub mod daemon;
pub mod data;
mod diagnosis;
pub mod directory;
pub mod engine;
pub mod events;
pub mod http;
pub mod identity;
mod mapping;
pub mod meta;
pub mod metrics;
pub mod nbd;
pub mod offline;
pub mod plane;
pub mod replication;
pub mod scrubs;
pub mod stream;
pub mod tail;
pub mod volumes;
