//! fio's nbd engine, on a leash: it spins and complains without end when its server goes away, and its job is a process
//! of its own unless it is told to use threads.

use std::time::Duration;

use crate::tool::Tool;

/// Builder of fio command lines.
pub struct Fio;

impl Fio {
    /// A run of fio on `uri`.
    pub fn plain(uri: &str) -> Tool {
        Tool::new("fio")
            .args(["--name=job", "--ioengine=nbd", "--thread", "--eta=never"])
            .arg(format!("--uri={uri}"))
            .limit(Duration::from_secs(240))
    }

    /// A run that verifies everything it wrote, and stops at the first difference.
    pub fn verify(uri: &str) -> Tool {
        Fio::plain(uri).args([
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_backlog=1024",
            "--verify_state_save=0",
        ])
    }
}
