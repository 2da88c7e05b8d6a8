//! What the integration tests are built from: a real daemon under control, outside programs under a time limit, an NBD
//! client of the tests' own, and the checkers.
//!
//! Nothing here is shared with the product's code: a checker that used the server's codec or checksum would agree with
//! the server's mistakes. docs/testing.md says which test checks which promise.

pub mod admin;
pub mod campaign;
pub mod certificate;
pub mod cluster;
pub mod csi;
pub mod daemon;
pub mod etcd;
pub mod fio;
pub mod history;
pub mod http;
pub mod ledger;
pub mod log;
pub mod nbd;
pub mod network;
pub mod orchestrator;
pub mod pattern;
pub mod process;
pub mod reference;
pub mod rpc;
pub mod scratch;
pub mod seed;
pub mod suites;
pub mod tool;
pub mod vm;
pub mod wait;
pub mod workload;
