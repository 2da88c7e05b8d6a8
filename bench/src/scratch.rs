//! The directories of a run, removed at its end.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Where a contender's data and its sockets lie.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// On the medium to measure.
    pub(crate) data: PathBuf,
    /// On a tmpfs where there is one, and short: the name of a Unix socket may have 107 bytes.
    pub(crate) sockets: PathBuf,
    keep: bool,
}

/// The tmpfs of this machine.
const SHARED_MEMORY: &str = "/dev/shm";

/// A directory in memory, for stores.
pub(crate) fn memory() -> Result<PathBuf> {
    let memory = PathBuf::from(SHARED_MEMORY);
    ensure!(memory.is_dir(), "there is no tmpfs at {SHARED_MEMORY}");
    Ok(memory)
}

impl Scratch {
    /// Makes both, the one for data in `base`.
    pub(crate) fn make(base: &Path, keep: bool) -> Result<Scratch> {
        let name = format!("ashlar-bench-{}", std::process::id());
        let data = base.join(format!("{name}-data"));
        fs::create_dir_all(&data).with_context(|| data.display().to_string())?;
        let data = data.canonicalize()?;
        // Ashlar's tail goes there too, as it does by default.
        let volatile = memory().unwrap_or_else(|_| std::env::temp_dir());
        let sockets = volatile.join(&name);
        fs::create_dir(&sockets).with_context(|| sockets.display().to_string())?;
        Ok(Scratch {
            data,
            sockets,
            keep,
        })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove(&self.sockets);
        if self.keep {
            eprintln!("kept {}", self.data.display());
        } else {
            remove(&self.data);
        }
    }
}

fn remove(directory: &Path) {
    if let Err(error) = fs::remove_dir_all(directory) {
        eprintln!("could not remove {}: {error}", directory.display());
    }
}
