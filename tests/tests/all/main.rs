//! The integration tests, one binary with a module per topic. docs/testing.md says which promise each one checks.

mod cluster;
mod command_line;
mod config;
mod controls;
mod copies;
mod crash;
mod csi;
mod deploy;
mod errors;
mod etcd;
mod faults;
mod full;
mod hostile;
mod idle;
mod interop;
mod orchestrator;
mod protocol;
mod replication;
mod restart;
mod rot;
mod tidy;
mod tls;
mod volumes;
