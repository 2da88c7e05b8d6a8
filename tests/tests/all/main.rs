//! The integration tests, one binary with a module per topic. docs/testing.md says which promise each one checks.

mod controls;
mod crash;
mod hostile;
mod interop;
mod protocol;
mod tidy;
