//! The integration tests, one binary with a module per topic. docs/testing.md says which promise each one checks.

mod command_line;
mod config;
mod controls;
mod crash;
mod csi;
mod errors;
mod faults;
mod full;
mod hostile;
mod idle;
mod interop;
mod orchestrator;
mod protocol;
mod restart;
mod rot;
mod tidy;
mod volumes;
