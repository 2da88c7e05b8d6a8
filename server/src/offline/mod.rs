//! A store read without a daemon: opened for reading only, looked at, verified, never written.

mod disk;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use ashlar_core::{
    store::{
        self, CheckReport, Inspection, OpenError,
        format::{Addr, SUPERBLOCK_BLOCKS, SUPERBLOCK_MAGIC},
    },
    units::BLOCK_BYTES,
};

use disk::ReadOnlyDisk;

/// A store that was found and can be read.
#[derive(Debug)]
pub struct OfflineStore {
    disk: ReadOnlyDisk,
    path: PathBuf,
}

/// Why there is nothing to read.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// No such path.
    #[error("{path} does not exist", path = path.display())]
    Missing {
        /// What was asked for.
        path: PathBuf,
    },
    /// A directory in which no file begins like a store.
    #[error("no store in {path}: give the file of a store (by default DATA_DIR/stores/0), its directory or its block device", path = path.display())]
    NoStore {
        /// The directory.
        path: PathBuf,
    },
    /// A directory with more than one.
    #[error("several stores in {path}: give one of {names}", path = path.display(), names = names.join(", "))]
    Several {
        /// The directory.
        path: PathBuf,
        /// The files in it that begin like a store.
        names: Vec<String>,
    },
    /// Neither a directory, nor a file, nor a block device.
    #[error("{path} is neither a directory, nor a file, nor a block device", path = path.display())]
    WrongType {
        /// What was asked for.
        path: PathBuf,
    },
    /// The system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// What was being opened.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

impl OfflineStore {
    /// Finds the store at `path`: a block device, a file, or a directory that holds the file of one store.
    pub fn open(path: &Path) -> Result<OfflineStore, OfflineError> {
        let file = if kind_of(path)?.is_dir() {
            the_store_in(path)?
        } else {
            path.to_owned()
        };
        let kind = kind_of(&file)?;
        if !kind.is_file() && !disk::is_block_device(&kind) {
            return Err(OfflineError::WrongType { path: file });
        }
        let disk = ReadOnlyDisk::open(&file).map_err(|source| OfflineError::Io {
            path: file.clone(),
            source,
        })?;
        Ok(OfflineStore { disk, path: file })
    }

    /// The file or device itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a daemon has it open. What is read then may change while it is read, so damage that is found need not be
    /// damage.
    pub fn in_use(&self) -> bool {
        self.disk.in_use()
    }

    /// Reads the superblock, the checkpoint and the headers of the log behind it.
    pub fn inspect(&mut self) -> Result<Inspection, OpenError> {
        store::inspect(&mut self.disk)
    }

    /// Reads everything the store refers to and compares it with its checksums. `progress` is told blocks done and blocks
    /// to do.
    pub fn check(&mut self, progress: impl FnMut(u64, u64)) -> Result<CheckReport, OpenError> {
        store::check(&mut self.disk, progress)
    }
}

fn kind_of(path: &Path) -> Result<fs::FileType, OfflineError> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(metadata.file_type()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(OfflineError::Missing {
            path: path.to_owned(),
        }),
        Err(source) => Err(OfflineError::Io {
            path: path.to_owned(),
            source,
        }),
    }
}

/// The one file of a directory, or of `stores` in it, that has a superblock's magic in any of the places where one is
/// kept: a store whose first copy is damaged is still found, and a data directory with one store will do.
fn the_store_in(directory: &Path) -> Result<PathBuf, OfflineError> {
    let mut found = stores_in(directory)?;
    let below = directory.join("stores");
    if found.is_empty() && below.is_dir() {
        found = stores_in(&below)?;
    }
    found.sort();
    match found.as_slice() {
        [] => Err(OfflineError::NoStore {
            path: directory.to_owned(),
        }),
        [one] => Ok(one.clone()),
        several => Err(OfflineError::Several {
            path: directory.to_owned(),
            names: several
                .iter()
                .map(|path| path.display().to_string())
                .collect(),
        }),
    }
}

fn stores_in(directory: &Path) -> Result<Vec<PathBuf>, OfflineError> {
    let io_error = |source| OfflineError::Io {
        path: directory.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(io_error)? {
        let entry = entry.map_err(io_error)?;
        if entry.file_type().is_ok_and(|kind| kind.is_file()) && begins_like_a_store(&entry.path())
        {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn begins_like_a_store(path: &Path) -> bool {
    let Ok(file) = fs::File::open(path) else {
        return false;
    };
    SUPERBLOCK_BLOCKS.as_flattened().iter().any(|block| {
        let mut magic = [0; SUPERBLOCK_MAGIC.len()];
        let read =
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut magic, Addr(*block).offset());
        read.is_ok() && magic == SUPERBLOCK_MAGIC
    })
}

/// Bytes in `blocks` blocks.
pub fn bytes(blocks: u64) -> u64 {
    blocks.saturating_mul(BLOCK_BYTES as u64)
}

#[cfg(test)]
mod tests;
