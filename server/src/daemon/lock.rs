//! One daemon a data directory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use thiserror::Error;

use crate::directory::DirectoryProblem;

/// The lock of a data directory, held as long as this lives; the kernel lets go of it when the process ends, however
/// that happens.
#[derive(Debug)]
pub(crate) struct DataDirLock {
    _file: File,
}

/// Why the data directory is not ours.
#[derive(Debug, Error)]
pub enum DataDirError {
    /// Another daemon uses it.
    #[error("the data directory {} is in use by {holder}; stop that one or choose another --data-dir", dir.display())]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// Who, as far as known.
        holder: String,
    },
    /// It cannot be made where it is missing.
    #[error("--data-dir: {0}")]
    Directory(DirectoryProblem),
    /// The system refused.
    #[error("the data directory {} cannot be used: {source}", dir.display())]
    Io {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl DataDirLock {
    /// Makes the directory, for its owner only, where it is missing, and locks it.
    pub(crate) fn take(dir: &Path) -> Result<DataDirLock, DataDirError> {
        let failed = |source| DataDirError::Io {
            dir: dir.to_owned(),
            source,
        };
        if let Some(problem) = DirectoryProblem::in_the_way_of(dir) {
            return Err(DataDirError::Directory(problem));
        }
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(failed)?;
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600);
        let mut file = options.open(dir.join("lock")).map_err(failed)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                // The number is for the message only; the lock is what counts.
                let _ = (&mut file).take(20).read_to_string(&mut pid);
                let holder = match pid.trim().parse::<u32>() {
                    Ok(pid) => format!("the ashlard with process id {pid}"),
                    Err(_) => "another ashlard".to_owned(),
                };
                return Err(DataDirError::InUse {
                    dir: dir.to_owned(),
                    holder,
                });
            }
            Err(errno) => return Err(failed(errno.into())),
        }
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        written.map_err(failed)?;
        Ok(DataDirLock { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_the_first_is() {
        let scratch = tempfile::tempdir().expect("temporary directory");
        let dir = scratch.path().join("deep/data");
        let first = DataDirLock::take(&dir).expect("free");
        let refusal = DataDirLock::take(&dir).expect_err("taken").to_string();
        assert!(
            refusal.contains(&format!("process id {}", std::process::id())),
            "{refusal}"
        );
        drop(first);
        DataDirLock::take(&dir).expect("free again");
    }

    #[test]
    fn a_file_in_its_place_is_told() {
        let scratch = tempfile::tempdir().expect("temporary directory");
        let dir = scratch.path().join("file");
        std::fs::write(&dir, b"").expect("write");
        for dir in [dir.clone(), dir.join("below")] {
            let refusal = DataDirLock::take(&dir).expect_err("refused").to_string();
            let right = format!(
                "--data-dir: {} is not a directory",
                scratch.path().join("file").display()
            );
            assert!(refusal.starts_with(&right), "{refusal}");
        }
    }
}
