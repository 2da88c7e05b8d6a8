//! Opening the file: whose it is, whether it is whole, and that nobody else has it.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode, OpenFlags};
use thiserror::Error;

/// Marks the file as ours in SQLite's header (`PRAGMA application_id`): "ASHL".
const APPLICATION_ID: i32 = 0x4153_484c;
/// Version of the tables (`PRAGMA user_version`) that this code reads and writes.
const SCHEMA_VERSION: i32 = 1;
/// The first bytes of every SQLite file that is not empty (SQLite file format, section 1.3).
const SQLITE_MAGIC: &[u8; 16] = b"SQLite format 3\0";

const SCHEMA: &str = "
CREATE TABLE records (
    key        TEXT PRIMARY KEY NOT NULL,
    value      BLOB NOT NULL,
    changed_at INTEGER NOT NULL
) WITHOUT ROWID;
-- What happened, for watches: value is NULL for a removal.
CREATE TABLE changes (
    revision INTEGER NOT NULL,
    position INTEGER NOT NULL,
    key      TEXT NOT NULL,
    value    BLOB,
    PRIMARY KEY (revision, position)
) WITHOUT ROWID;
-- One row. Changes up to and including compacted are no longer kept.
CREATE TABLE clock (
    only_row  INTEGER PRIMARY KEY CHECK (only_row = 0),
    revision  INTEGER NOT NULL,
    compacted INTEGER NOT NULL
);
INSERT INTO clock VALUES (0, 0, 0);
";

/// Why a metadata file is not opened. Nothing was written to it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OpenError {
    /// Another process, or this one, has it open.
    #[error("the metadata file {} is in use by another process; is another ashlard running on this data directory?", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// Not a file that Ashlar made.
    #[error("{} is not an Ashlar metadata file ({reason}); it was left as it is: move it away or choose another --data-dir", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// How that shows.
        reason: String,
    },
    /// Made by a newer version.
    #[error("the metadata file {} has version {found}, this ashlard knows up to {known}; install the newer version again", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i32,
        /// The newest this code knows.
        known: i32,
    },
    /// Damaged.
    #[error("the metadata file {} is damaged ({reason}); restore it from a backup. The stores hold the volumes' data and were not touched", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// The system refused.
    #[error("the metadata file {} cannot be opened: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

impl OpenError {
    /// The error that SQLite's answer means for opening `path`.
    pub(super) fn classify(path: &Path, error: &rusqlite::Error) -> OpenError {
        let path = path.to_owned();
        let reason = error.to_string();
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => OpenError::InUse { path },
            Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
                OpenError::Corrupt { path, reason }
            }
            _ => OpenError::Io { path, reason },
        }
    }

    fn io(path: &Path, error: &io::Error) -> OpenError {
        OpenError::Io {
            path: path.to_owned(),
            reason: error.to_string(),
        }
    }
}

/// Opens or creates the file and leaves the connection holding it exclusively.
pub(super) fn open(path: &Path) -> Result<Connection, OpenError> {
    let is_new = check_magic(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection =
        Connection::open_with_flags(path, flags).map_err(|e| OpenError::classify(path, &e))?;
    let sqlite = |error: rusqlite::Error| OpenError::classify(path, &error);

    connection
        .busy_timeout(std::time::Duration::ZERO)
        .map_err(sqlite)?;
    connection
        .pragma_update(None, "locking_mode", "EXCLUSIVE")
        .map_err(sqlite)?;
    // Reads only, until it is known whose file this is.
    let application: i32 = connection
        .pragma_query_value(None, "application_id", |r| r.get(0))
        .map_err(sqlite)?;
    let version: i32 = connection
        .pragma_query_value(None, "user_version", |r| r.get(0))
        .map_err(sqlite)?;
    let tables: i64 = connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get(0))
        .map_err(sqlite)?;
    let is_empty = application == 0 && version == 0 && tables == 0;
    if !is_empty {
        if application != APPLICATION_ID {
            let reason = format!("a SQLite file of application {application:#010x}");
            return Err(OpenError::Foreign {
                path: path.to_owned(),
                reason,
            });
        }
        if version > SCHEMA_VERSION {
            return Err(OpenError::Newer {
                path: path.to_owned(),
                found: version,
                known: SCHEMA_VERSION,
            });
        }
        let verdict: String = connection
            .pragma_query_value(None, "quick_check", |r| r.get(0))
            .map_err(sqlite)?;
        if verdict != "ok" {
            return Err(OpenError::Corrupt {
                path: path.to_owned(),
                reason: verdict,
            });
        }
    }
    connection
        .pragma_update(None, "journal_mode", "WAL")
        .map_err(sqlite)?;
    connection
        .pragma_update(None, "synchronous", "FULL")
        .map_err(sqlite)?;
    // Takes the exclusive lock now and not at the first change.
    connection
        .execute_batch("BEGIN EXCLUSIVE; COMMIT")
        .map_err(sqlite)?;
    if is_empty {
        connection
            .execute_batch(&format!(
                "BEGIN; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; {SCHEMA} COMMIT"
            ))
            .map_err(sqlite)?;
    }
    if is_new && let Some(parent) = path.parent() {
        // The file's name must survive a power cut as its contents do.
        std::fs::File::open(parent)
            .and_then(|dir| dir.sync_all())
            .map_err(|e| OpenError::io(parent, &e))?;
    }
    Ok(connection)
}

/// Creates the file, readable by its owner only, when it is not there, and looks at its first bytes when it is.
/// Answers whether it is new.
fn check_magic(path: &Path) -> Result<bool, OpenError> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600);
    let mut file = options.open(path).map_err(|e| OpenError::io(path, &e))?;
    if !file
        .metadata()
        .map_err(|e| OpenError::io(path, &e))?
        .is_file()
    {
        return Err(OpenError::Foreign {
            path: path.to_owned(),
            reason: "not a regular file".to_owned(),
        });
    }
    let mut magic = Vec::new();
    (&mut file)
        .take(SQLITE_MAGIC.len() as u64)
        .read_to_end(&mut magic)
        .map_err(|e| OpenError::io(path, &e))?;
    if magic.is_empty() {
        return Ok(true);
    }
    if magic != SQLITE_MAGIC {
        return Err(OpenError::Foreign {
            path: path.to_owned(),
            reason: "it does not begin like one".to_owned(),
        });
    }
    Ok(false)
}
