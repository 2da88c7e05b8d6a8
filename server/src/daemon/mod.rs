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
pub(crate) use lock::DataDirLock;
pub(crate) use metadata::{certificate_names, connect, node_record, open_local};
pub use process::Usage;
pub use run::{DaemonError, run};
pub use state::State;
pub(crate) use state::{ClusterServices, Phase, Services, usage};

#[cfg(test)]
mod tests;
