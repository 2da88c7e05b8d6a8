//! The file behind a store's tail: mapped memory that outlives the daemon.
//!
//! On tmpfs where there is one outside the process (`/run`, then `/dev/shm`), because there a page needs no disk to
//! stay; otherwise in the data directory. The file is allocated in full before it is mapped, so that touching a page
//! never finds the file system full (which would be a SIGBUS).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ashlar_core::units::StoreId;
use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::config::ByteCount;
use crate::directory::DirectoryProblem;
use crate::mapping::Mapping;

/// `statfs.f_type` of tmpfs, from <linux/magic.h>.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// A mapped tail, locked for this process.
#[derive(Debug)]
pub struct TailFile {
    map: Mapping,
    path: PathBuf,
    /// True when the file was made by this call and holds zeros.
    created: bool,
    /// Held for its lock; the mapping alone would let another process open the tail.
    file: File,
}

/// A tail's name in its directory, for whoever is to remove the file while the mapping belongs to a store. Shares the
/// lock: no other process has the tail as long as this lives.
#[derive(Debug)]
pub struct TailName {
    path: PathBuf,
    file: File,
}

impl TailName {
    /// Removes the file, unless another one has taken its name. For a tail that nothing depends on any more.
    pub fn remove(&self) -> io::Result<()> {
        let ours = self.file.metadata()?;
        match std::fs::symlink_metadata(&self.path) {
            Ok(there) if (there.dev(), there.ino()) != (ours.dev(), ours.ino()) => Ok(()),
            Ok(_) => std::fs::remove_file(&self.path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Why a tail could not be had. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum TailError {
    #[error("tail {path} belongs to another user or is not a plain file; remove it or choose another tail directory", path = path.display())]
    NotOurs { path: PathBuf },
    #[error("tail {path} is in use by another process (a running ashlard?)", path = path.display())]
    InUse { path: PathBuf },
    #[error("two tails exist for one store, {first} and {second}; move the one that is a stray copy away", first = first.display(), second = second.display())]
    Two { first: PathBuf, second: PathBuf },
    #[error("--tail-dir: {0}, or leave the setting out")]
    Directory(DirectoryProblem),
    #[error("a tail of {size} cannot be made ({tried}); name another directory by --tail-dir, or a smaller --tail-size", size = ByteCount(*bytes))]
    NoRoom { bytes: u64, tried: String },
    #[error("tail {path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl TailFile {
    /// Finds the tail of `store`, or makes one of `bytes` zero bytes.
    ///
    /// `configured`: the only directory a new tail may be made in. A tail that exists is used where it is and keeps
    /// its size, because it may hold the only copy of acknowledged writes.
    pub fn open(
        store: StoreId,
        bytes: u64,
        configured: Option<&Path>,
        data_dir: &Path,
    ) -> Result<TailFile, TailError> {
        let name = format!("ashlar-{}.tail", store.0);
        let mut places: Vec<PathBuf> = Vec::new();
        if let Some(dir) = configured {
            places.push(dir.to_path_buf());
        }
        let chosen = places.len();
        places.extend(
            ["/run", "/dev/shm"]
                .map(PathBuf::from)
                .into_iter()
                .filter(|dir| is_tmpfs(dir)),
        );
        places.push(data_dir.to_path_buf());
        let mut seen = Vec::new();
        places.retain(|dir| {
            let real = dir.canonicalize().unwrap_or_else(|_| dir.clone());
            !seen.contains(&real) && {
                seen.push(real);
                true
            }
        });

        let mut found: Option<TailFile> = None;
        for dir in &places {
            if let Some(tail) = TailFile::open_existing(dir.join(&name))? {
                if let Some(first) = found {
                    return Err(TailError::Two {
                        first: first.path,
                        second: tail.path,
                    });
                }
                found = Some(tail);
            }
        }
        if let Some(tail) = found {
            return Ok(tail);
        }
        let allowed = if chosen == 1 {
            &places[..1]
        } else {
            &places[..]
        };
        if let Some(problem) = configured.and_then(DirectoryProblem::of) {
            return Err(TailError::Directory(problem));
        }
        let mut tried = Vec::new();
        for dir in allowed {
            match TailFile::create(dir.join(&name), bytes) {
                Ok(tail) => return Ok(tail),
                Err(error) => tried.push(format!("{}: {error}", dir.display())),
            }
        }
        Err(TailError::NoRoom {
            bytes,
            tried: tried.join(", "),
        })
    }

    fn open_existing(path: PathBuf) -> Result<Option<TailFile>, TailError> {
        let io_error = |source: io::Error| TailError::Io {
            path: path.clone(),
            source,
        };
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(fd) => TailFile::take(path, File::from(fd)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(Errno::LOOP) => Err(TailError::NotOurs { path }),
            Err(e) => Err(io_error(e.into())),
        }
    }

    /// Locks and maps what was opened; `None` when it holds nothing.
    fn take(path: PathBuf, file: File) -> Result<Option<TailFile>, TailError> {
        let io_error = |source: io::Error| TailError::Io {
            path: path.clone(),
            source,
        };
        let meta = file.metadata().map_err(&io_error)?;
        let ours = meta.is_file()
            && meta.uid() == rustix::process::geteuid().as_raw()
            && meta.mode() & 0o077 == 0
            && meta.nlink() <= 1;
        if !ours {
            return Err(TailError::NotOurs { path });
        }
        if meta.len() == 0 {
            // Made by a daemon that was killed before it had allocated it.
            let _ = rustix::fs::unlink(&path);
            return Ok(None);
        }
        lock(&file, &path)?;
        // Its owner may have removed it, as a clean stop does, after it was found here: what is written to a file
        // without a name is gone with the process.
        if file.metadata().map_err(&io_error)?.nlink() == 0 {
            return Ok(None);
        }
        // A hole in a file on a full file system would be a SIGBUS later.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, meta.len())
            .map_err(|e| io_error(e.into()))?;
        let map = map(&file, meta.len()).map_err(&io_error)?;
        Ok(Some(TailFile {
            map,
            path,
            created: false,
            file,
        }))
    }

    fn create(path: PathBuf, bytes: u64) -> io::Result<TailFile> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd: OwnedFd = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)?;
        let file = File::from(fd);
        let made = (|| {
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
            map(&file, bytes)
        })();
        match made {
            Ok(map) => Ok(TailFile {
                map,
                path,
                created: true,
                file,
            }),
            Err(e) => {
                let _ = rustix::fs::unlink(&path);
                Err(e)
            }
        }
    }

    /// What it takes to remove the file later, and its lock.
    pub fn name(&self) -> io::Result<TailName> {
        Ok(TailName {
            path: self.path.clone(),
            file: self.file.try_clone()?,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// True when [`TailFile::open`] made it.
    pub fn created(&self) -> bool {
        self.created
    }

    /// Whether it outlives the process without a disk.
    pub fn on_tmpfs(&self) -> bool {
        self.path.parent().is_some_and(is_tmpfs)
    }
}

impl std::ops::Deref for TailFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl std::ops::DerefMut for TailFile {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }
}

fn lock(file: &File, path: &Path) -> Result<(), TailError> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(TailError::InUse {
            path: path.to_path_buf(),
        }),
        Err(e) => Err(TailError::Io {
            path: path.to_path_buf(),
            source: e.into(),
        }),
    }
}

fn map(file: &File, bytes: u64) -> io::Result<Mapping> {
    let len = usize::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the file is ours alone: mode 0600, this user's, locked, and no code of ours truncates it.
    let mut map = unsafe { Mapping::of(file, len)? };
    if let Err(error) = map.use_large_pages() {
        tracing::debug!(%error, "the tail does not lie in large pages");
    }
    Ok(map)
}

pub(crate) fn is_tmpfs(dir: impl AsRef<Path>) -> bool {
    rustix::fs::statfs(dir.as_ref()).is_ok_and(|stat| stat.f_type == TMPFS_MAGIC)
}

/// The kernel's name for this boot: a tail written under another one is void.
pub fn boot_id() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let id = uuid::Uuid::parse_str(text.trim())
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    Ok(id.into_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use uuid::Uuid;

    use super::*;

    const BYTES: u64 = 1 << 20;

    fn id() -> StoreId {
        StoreId(Uuid::new_v4())
    }

    #[test]
    fn what_was_written_is_there_for_the_next_open() {
        let dir = tempfile::tempdir().expect("dir");
        let id = id();
        let mut tail = TailFile::open(id, BYTES, Some(dir.path()), dir.path()).expect("create");
        assert!(tail.created() && tail.len() as u64 == BYTES && tail.iter().all(|b| *b == 0));
        assert_eq!(tail.file.metadata().expect("meta").mode() & 0o777, 0o600);
        tail[4096] = 7;
        assert!(matches!(
            TailFile::open(id, BYTES, Some(dir.path()), dir.path()),
            Err(TailError::InUse { .. })
        ));
        drop(tail);
        // The size it has counts, wherever it lies.
        let other = tempfile::tempdir().expect("dir");
        let tail = TailFile::open(id, 2 * BYTES, Some(other.path()), dir.path()).expect("open");
        assert!(!tail.created() && tail.len() as u64 == BYTES && tail[4096] == 7);
    }

    #[test]
    fn strange_files_are_refused() {
        let dir = tempfile::tempdir().expect("dir");
        let path = |id: StoreId| dir.path().join(format!("ashlar-{}.tail", id.0));
        let open = |id| TailFile::open(id, BYTES, Some(dir.path()), dir.path());
        let linked = id();
        std::fs::write(dir.path().join("target"), [0; 4096]).expect("write");
        symlink(dir.path().join("target"), path(linked)).expect("link");
        assert!(matches!(open(linked), Err(TailError::NotOurs { .. })));
        let readable = id();
        std::fs::write(path(readable), [0; 4096]).expect("write");
        std::fs::set_permissions(path(readable), std::fs::Permissions::from_mode(0o644))
            .expect("chmod");
        assert!(matches!(open(readable), Err(TailError::NotOurs { .. })));
        let huge = id();
        assert!(matches!(
            TailFile::open(huge, 1 << 60, Some(dir.path()), dir.path()),
            Err(TailError::NoRoom { .. })
        ));
        assert!(!path(huge).exists());
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().expect("dir");
        let (missing, file) = (dir.path().join("missing"), dir.path().join("file"));
        std::fs::write(&file, b"").expect("write");
        let said = |configured: &Path| {
            TailFile::open(id(), BYTES, Some(configured), dir.path())
                .expect_err("refused")
                .to_string()
        };
        let refusal = said(&missing);
        let named = refusal.contains(missing.to_str().expect("text"));
        assert!(named && refusal.contains("does not exist"), "{refusal}");
        let refusal = said(&file);
        assert!(refusal.contains("is not a directory"), "{refusal}");
        // No room is another thing.
        let refusal = TailFile::open(id(), 1 << 60, Some(dir.path()), dir.path())
            .expect_err("refused")
            .to_string();
        let named = refusal.contains(dir.path().to_str().expect("text"));
        assert!(named && refusal.contains("--tail-size"), "{refusal}");
    }

    #[test]
    fn a_tail_that_is_removed_while_it_is_found_is_none() {
        let dir = tempfile::tempdir().expect("dir");
        let id = id();
        let open = || TailFile::open(id, BYTES, Some(dir.path()), dir.path());
        let first = open().expect("create");
        let path = first.path().to_path_buf();
        let name = first.name().expect("name");
        // The next daemon has found the file, the last one removes it and lets go of the lock.
        let found = File::options().read(true).write(true).open(&path);
        name.remove().expect("remove");
        drop(first);
        assert!(
            matches!(
                TailFile::take(path.clone(), found.expect("open")),
                Err(TailError::InUse { .. })
            ),
            "the name holds the lock too"
        );
        let again = open().expect("another one");
        assert!(again.created());
        // It has taken the name, and is left alone.
        name.remove().expect("nothing to remove");
        assert!(path.exists());
        let found = File::options().read(true).write(true).open(&path);
        again.name().expect("name").remove().expect("remove");
        drop(again);
        let taken = TailFile::take(path.clone(), found.expect("open")).expect("no error");
        assert!(taken.is_none() && !path.exists());
    }

    #[test]
    fn two_copies_are_refused() {
        let dirs = [
            tempfile::tempdir().expect("dir"),
            tempfile::tempdir().expect("dir"),
        ];
        let id = id();
        for dir in &dirs {
            drop(TailFile::open(id, BYTES, Some(dir.path()), dir.path()).expect("create"));
        }
        assert!(matches!(
            TailFile::open(id, BYTES, Some(dirs[0].path()), dirs[1].path()),
            Err(TailError::Two { .. })
        ));
    }
}
