//! Small files of this program's own, replaced as a whole: whatever kills it, one finds the old one or the new one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Serialize;

/// The ending of a file that is not whole yet. One that is found was left by a crash and is of no use.
pub const UNFINISHED: &str = "new";

/// Puts `record`, as JSON and for this user alone, in the place of what is at `path`. Durable when this returns.
pub fn replace(path: &Path, record: &impl Serialize) -> io::Result<()> {
    let fresh = path.with_extension(UNFINISHED);
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&fresh)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    file.sync_all()?;
    fs::rename(&fresh, path)?;
    sync_directory(path)
}

/// Removes a file; one that is not there is fine. Durable when this returns.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => sync_directory(path),
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}
