//! The daemon: everything wired together, from the command line to the last byte of a drain.

mod data_plane;
mod lock;
mod logging;
mod metadata;
mod notify;
mod process;
mod run;
mod state;
mod stores;

pub use lock::DataDirError;
pub use process::Usage;
pub use run::{DaemonError, run};
pub use state::State;
pub(crate) use state::{Phase, Services, usage};

#[cfg(test)]
mod tests;
