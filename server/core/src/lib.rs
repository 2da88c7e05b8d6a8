//! The deciding half of Ashlar.
//!
//! Nothing here does I/O, reads a clock, draws a random number or waits: every machine takes events and returns
//! actions, so one seed replays one run. The shell in `ashlar-server` carries the actions out.

pub mod diagnosis;
pub mod nbd;
pub mod placement;
pub mod records;
pub mod replication;
pub mod store;
pub mod units;
pub mod volume;
