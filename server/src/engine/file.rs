//! Opening a store's file or device so that no other daemon can have it too.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

/// How long to wait for the lock of a store. The operations that a killed process leaves behind end with the device's
/// answers; disks answer within seconds or are failing.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks at the lock: well below what a restart takes.
const LOCK_LOOK_EVERY: Duration = Duration::from_millis(5);

/// A store's file or block device, locked for this process for as long as it is open.
#[derive(Clone, Debug)]
pub struct StoreFile {
    pub fd: Arc<OwnedFd>,
    pub path: PathBuf,
    /// Bytes it can hold: the device's size, or for a file its present length.
    pub size_bytes: u64,
    pub is_device: bool,
    /// False where the file system does not take O_DIRECT (tmpfs): I/O goes through the page cache.
    pub direct: bool,
    /// True when this call made the file.
    pub created: bool,
}

/// Why a store could not be opened. Every message names the path and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenStoreError {
    #[error("store {path} is already open in another process (a running ashlard?); stop that one first", path = path.display())]
    InUse { path: PathBuf },
    #[error("store {path} does not exist", path = path.display())]
    Missing { path: PathBuf },
    #[error("store {path} is neither a file nor a block device", path = path.display())]
    WrongType { path: PathBuf },
    #[error("block device {path} uses sectors of {sector_bytes} bytes; at most 4096 are supported", path = path.display())]
    SectorTooLarge { path: PathBuf, sector_bytes: u32 },
    #[error("cannot open store {path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl StoreFile {
    /// Opens an existing file or device for reading and writing.
    pub fn open(path: &Path) -> Result<StoreFile, OpenStoreError> {
        StoreFile::open_with(path, false, false)
    }

    /// Opens a file or device, making an empty file of mode 0600 where there is none.
    pub fn open_or_create(path: &Path) -> Result<StoreFile, OpenStoreError> {
        StoreFile::open_with(path, true, false)
    }

    /// Opens for reading only, for offline inspection. The lock is taken all the same: a store that is being written
    /// has no state to inspect.
    pub fn open_read_only(path: &Path) -> Result<StoreFile, OpenStoreError> {
        StoreFile::open_with(path, false, true)
    }

    fn open_with(path: &Path, create: bool, read_only: bool) -> Result<StoreFile, OpenStoreError> {
        let at = || path.to_path_buf();
        let io_error = |source: io::Error| OpenStoreError::Io {
            path: path.to_path_buf(),
            source,
        };
        let existing = match rustix::fs::stat(path) {
            Ok(stat) => Some(FileType::from_raw_mode(stat.st_mode)),
            Err(Errno::NOENT) if create => None,
            Err(Errno::NOENT) => return Err(OpenStoreError::Missing { path: at() }),
            Err(e) => return Err(io_error(e.into())),
        };
        let is_device = match existing {
            Some(FileType::BlockDevice) => true,
            Some(FileType::RegularFile) | None => false,
            Some(_) => return Err(OpenStoreError::WrongType { path: at() }),
        };
        let mut flags = OFlags::CLOEXEC
            | OFlags::NOCTTY
            | if read_only {
                OFlags::RDONLY
            } else {
                OFlags::RDWR
            };
        if existing.is_none() {
            flags |= OFlags::CREATE | OFlags::EXCL;
        }
        if is_device && !read_only {
            // Exclusive on a device: refused while it is mounted, swapped on, or part of another device.
            flags |= OFlags::EXCL;
        }
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|e| io_error(io::Error::new(io::ErrorKind::InvalidInput, e)))?;
        let mode = Mode::RUSR | Mode::WUSR;
        // A process that was killed with io_uring operations in flight is gone before its ring is: its file stays open, and
        // locked, until the last of them is done, and until then they may still write. So one that is held is waited for a while.
        let mut held_since = None;
        let mut held = || {
            let since = *held_since.get_or_insert_with(|| {
                tracing::info!(path = %path.display(), "the store is held by another process");
                Instant::now()
            });
            if read_only || since.elapsed() >= LOCK_PATIENCE {
                return Err(OpenStoreError::InUse { path: at() });
            }
            std::thread::sleep(LOCK_LOOK_EVERY);
            Ok(())
        };
        let (fd, direct) = loop {
            match rustix::fs::open(&name, flags | OFlags::DIRECT, mode) {
                Ok(fd) => break (fd, true),
                // The file may have been made by the refused call.
                Err(Errno::INVAL) => {
                    let fd = rustix::fs::open(&name, flags & !OFlags::EXCL, mode);
                    break (fd.map_err(|e| io_error(e.into()))?, false);
                }
                Err(Errno::BUSY) => held()?,
                Err(e) => return Err(io_error(e.into())),
            }
        };
        // A lock of the open file description: another open of the same process is refused too.
        let lock = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        loop {
            match rustix::fs::flock(&fd, lock) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) => held()?,
                Err(Errno::INTR) => {}
                Err(e) => return Err(io_error(e.into())),
            }
        }
        let size_bytes = if is_device {
            let sector_bytes = device_sector_bytes(&fd).map_err(&io_error)?;
            if sector_bytes > 4096 {
                return Err(OpenStoreError::SectorTooLarge {
                    path: at(),
                    sector_bytes,
                });
            }
            device_bytes(&fd).map_err(io_error)?
        } else {
            rustix::fs::fstat(&fd)
                .map_err(|e| io_error(e.into()))?
                .st_size as u64
        };
        Ok(StoreFile {
            fd: Arc::new(fd),
            path: at(),
            size_bytes,
            is_device,
            direct,
            created: existing.is_none(),
        })
    }

    /// Bytes free in the file system that holds the file; for a device, 0.
    pub fn free_bytes_around(&self) -> io::Result<u64> {
        if self.is_device {
            return Ok(0);
        }
        let stat = rustix::fs::fstatvfs(&*self.fd)?;
        Ok(stat.f_bavail * stat.f_frsize)
    }
}

/// Whether a file's bytes lie in memory (tmpfs). A device does not, though its name may lie in a file system that does.
pub(super) fn is_in_memory(file: impl AsFd + Copy) -> io::Result<bool> {
    let mode = rustix::fs::fstat(file)?.st_mode;
    Ok(FileType::from_raw_mode(mode) == FileType::RegularFile
        && rustix::fs::fstatfs(file)?.f_type == libc::TMPFS_MAGIC)
}

/// BLKGETSIZE64.
fn device_bytes(fd: impl AsFd) -> io::Result<u64> {
    // <linux/fs.h>: _IOR(0x12, 114, size_t)
    const BLKGETSIZE64: u64 = 0x8008_1272;
    let mut bytes = 0u64;
    // SAFETY: the ioctl writes one u64.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKGETSIZE64 as _, &raw mut bytes) };
    if result == 0 {
        Ok(bytes)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// BLKSSZGET: the logical sector, which direct I/O must be aligned to.
fn device_sector_bytes(fd: impl AsFd) -> io::Result<u32> {
    // <linux/fs.h>: _IO(0x12, 104)
    const BLKSSZGET: u64 = 0x1268;
    let mut bytes = 0i32;
    // SAFETY: the ioctl writes one int.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKSSZGET as _, &raw mut bytes) };
    if result == 0 {
        Ok(bytes as u32)
    } else {
        Err(io::Error::last_os_error())
    }
}
