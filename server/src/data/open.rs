//! Opening a store: its file, its tail, and what recovery has to say.

use std::io::{self, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use ashlar_core::store::format::{LEAF_DISK_BYTES, SUPERBLOCK_BLOCKS, Superblock};
use ashlar_core::store::{
    AlignedBuf, BlockingDisk, DiskError, Errno, FormatError, Geometry, OpenError, OpenOptions,
    Params, Store, TailMemory, format_store, tail_bytes,
};
use ashlar_core::units::{BLOCK_BYTES, StoreId};
use uuid::Uuid;

use super::config::{DataConfig, OpenedStore, StartError, StoreConfig};
use crate::engine::StoreFile;
use crate::tail::{TailFile, TailName, boot_id};

/// Segments a new store is allocated with; it grows as it fills.
const INITIAL_SEGMENTS: u32 = 16;

impl TailMemory for TailFile {
    fn as_mut_ptr(&mut self) -> *mut u8 {
        std::ops::DerefMut::deref_mut(self).as_mut_ptr()
    }

    fn len(&self) -> usize {
        std::ops::Deref::deref(self).len()
    }
}

/// A store's file, used one request after the other. Reads beyond the end of the file give zeros.
pub struct FileDisk {
    file: std::fs::File,
}

impl FileDisk {
    /// Shares the open file, and its lock, with `file`.
    pub fn new(file: &StoreFile) -> io::Result<FileDisk> {
        Ok(FileDisk {
            file: std::fs::File::from(OwnedFd::try_clone(&file.fd)?),
        })
    }
}

fn disk_error(error: io::Error) -> DiskError {
    DiskError(Errno(error.raw_os_error().unwrap_or(5)))
}

/// Calls `each` with the part of the transfer that an aligned bounce buffer holds, when the caller's memory is not
/// aligned for direct I/O.
const BOUNCE_BYTES: usize = 1 << 20;

impl BlockingDisk for FileDisk {
    fn size_bytes(&mut self) -> Result<u64, DiskError> {
        // The metadata of a device have no length. The file's position is nobody else's: all transfers name their offset.
        self.file.seek(io::SeekFrom::End(0)).map_err(disk_error)
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        if (buf.as_ptr() as usize).is_multiple_of(BLOCK_BYTES)
            && buf.len().is_multiple_of(BLOCK_BYTES)
            && offset.is_multiple_of(BLOCK_BYTES as u64)
        {
            return read_or_zero(&self.file, offset, buf).map_err(disk_error);
        }
        let mut at = 0;
        let mut bounce = AlignedBuf::zeroed(BOUNCE_BYTES);
        while at < buf.len() {
            let from = offset + at as u64;
            let skip = (from % BLOCK_BYTES as u64) as usize;
            let len = (buf.len() - at).min(BOUNCE_BYTES - skip);
            let whole = (skip + len).next_multiple_of(BLOCK_BYTES);
            read_or_zero(&self.file, from - skip as u64, &mut bounce[..whole])
                .map_err(disk_error)?;
            buf[at..at + len].copy_from_slice(&bounce[skip..skip + len]);
            at += len;
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        assert!(
            offset.is_multiple_of(BLOCK_BYTES as u64) && buf.len().is_multiple_of(BLOCK_BYTES),
            "a store writes whole blocks"
        );
        if (buf.as_ptr() as usize).is_multiple_of(BLOCK_BYTES) {
            return self.file.write_all_at(buf, offset).map_err(disk_error);
        }
        let mut bounce = AlignedBuf::zeroed(BOUNCE_BYTES.min(buf.len()));
        for (i, piece) in buf.chunks(BOUNCE_BYTES).enumerate() {
            bounce[..piece.len()].copy_from_slice(piece);
            self.file
                .write_all_at(&bounce[..piece.len()], offset + (i * BOUNCE_BYTES) as u64)
                .map_err(disk_error)?;
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        self.file.sync_data().map_err(disk_error)
    }

    fn allocate(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        use rustix::io::Errno as E;
        match rustix::fs::fallocate(&self.file, rustix::fs::FallocateFlags::empty(), offset, len) {
            // Devices have no fallocate; writing allocates just as well.
            Ok(()) | Err(E::OPNOTSUPP | E::NODEV | E::INVAL) => {}
            Err(e) => return Err(DiskError(Errno(e.raw_os_error()))),
        }
        let zeros = AlignedBuf::zeroed(BOUNCE_BYTES);
        let mut at = 0;
        while at < len {
            let part = (len - at).min(BOUNCE_BYTES as u64) as usize;
            self.file
                .write_all_at(&zeros[..part], offset + at)
                .map_err(disk_error)?;
            at += part as u64;
        }
        self.sync()
    }
}

fn read_or_zero(file: &std::fs::File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let mut at = 0;
    while at < buf.len() {
        match file.read_at(&mut buf[at..], offset + at as u64) {
            Ok(0) => {
                buf[at..].fill(0);
                return Ok(());
            }
            Ok(n) => at += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// What stands where a store's superblocks would be.
enum Found {
    Store(Superblock),
    /// No byte that is not zero.
    Nothing,
    SomethingElse,
}

fn look(disk: &mut FileDisk) -> Result<Found, OpenError> {
    let mut block = AlignedBuf::blocks(1);
    let mut newest: Option<Superblock> = None;
    let (mut blank, mut damaged) = (true, false);
    let mut unreadable = None;
    for at in SUPERBLOCK_BLOCKS.into_iter().flatten() {
        match disk.read(u64::from(at) * BLOCK_BYTES as u64, &mut block) {
            Ok(()) => {}
            // Whether the others are enough to open it is for the store to say.
            Err(error) if error.is_of_the_medium() => {
                unreadable = Some(error);
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        blank &= block.iter().all(|byte| *byte == 0);
        match Superblock::decode(&block) {
            Ok(found)
                if newest
                    .as_ref()
                    .is_none_or(|n| n.generation < found.generation) =>
            {
                newest = Some(found)
            }
            Ok(_) | Err(FormatError::Magic) => {}
            Err(FormatError::Version(version)) => return Err(OpenError::Version(version)),
            Err(_) => damaged = true,
        }
    }
    match (newest, unreadable) {
        (Some(found), _) => Ok(Found::Store(found)),
        (None, Some(error)) => Err(error.into()),
        (None, None) if damaged => Err(OpenError::SuperblockDamaged),
        (None, None) if blank => Ok(Found::Nothing),
        (None, None) => Ok(Found::SomethingElse),
    }
}

/// A store ready to be driven.
pub(super) struct Opened {
    pub(super) store: Store,
    pub(super) fd: Arc<OwnedFd>,
    pub(super) tail: TailName,
    pub(super) report: OpenedStore,
}

/// Opens one store, making it where there is nothing yet.
pub(super) fn open_store(
    config: &DataConfig,
    store: &StoreConfig,
    thread: usize,
) -> Result<Opened, StartError> {
    let begun = Instant::now();
    let path = &store.path;
    if let Some(dir) = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty() && !dir.exists())
    {
        if let Some(expected) = store.expected {
            return Err(StartError::Emptied {
                path: path.clone(),
                expected,
            });
        }
        std::fs::create_dir_all(dir).map_err(|source| StartError::Io {
            what: "cannot make the store's directory",
            source,
        })?;
    }
    let file = match (StoreFile::open(path), store.expected) {
        (Err(crate::engine::OpenStoreError::Missing { .. }), Some(expected)) => {
            return Err(StartError::Emptied {
                path: path.clone(),
                expected,
            });
        }
        (Err(crate::engine::OpenStoreError::Missing { .. }), None) => {
            StoreFile::open_or_create(path)?
        }
        (opened, _) => opened?,
    };
    let mut disk = FileDisk::new(&file).map_err(|source| StartError::Io {
        what: "cannot share the store's file",
        source,
    })?;
    let wrong = |source: OpenError| StartError::Store {
        path: path.clone(),
        source,
    };

    let (id, formatted) = match look(&mut disk).map_err(wrong)? {
        Found::Store(superblock) => (superblock.store, false),
        Found::Nothing => match store.expected {
            Some(expected) => {
                return Err(StartError::Emptied {
                    path: path.clone(),
                    expected,
                });
            }
            // Zeros at the start of a device or file with other contents are not an invitation.
            None if !file.created && !looks_blank(&mut disk, file.size_bytes).map_err(wrong)? => {
                return Err(StartError::NotAStore { path: path.clone() });
            }
            None => (make_store(config, store, &file, &mut disk)?, true),
        },
        Found::SomethingElse => return Err(StartError::NotAStore { path: path.clone() }),
    };
    if let Some(expected) = store.expected.filter(|expected| *expected != id) {
        return Err(StartError::Swapped {
            path: path.clone(),
            found: id,
            expected,
        });
    }

    let tail = TailFile::open(
        id,
        tail_bytes(config.tail_bytes) as u64,
        config.tail_dir.as_deref(),
        &config.data_dir,
    )?;
    let tail_path = tail.path().to_path_buf();
    let tail_name = tail.name().map_err(|source| StartError::Io {
        what: "cannot share the tail's file",
        source,
    })?;
    let params = Params {
        leaf_cache: (config.cache_bytes / LEAF_DISK_BYTES as u64) as usize,
        ..Params::default()
    };
    let options = OpenOptions {
        node: config.node.0.into_bytes(),
        // Without a boot id no tail can be believed; the store then treats every one as void.
        boot: boot_id().unwrap_or_else(|error| {
            tracing::error!(%error, "no boot id: acknowledged writes that were not flushed do not outlive the daemon");
            [0; 16]
        }),
        accept_tail_loss: config.accept_tail_loss,
    };
    let (opened, report) =
        Store::open(&mut disk, Box::new(tail), params, &options).map_err(wrong)?;
    if let Some(at) = report.unreadable_end {
        tracing::warn!(
            store = %id.0, path = %path.display(), block = at.0,
            "the device cannot read the block at which the log ends: taken for a write that was cut off"
        );
    }
    let report = OpenedStore {
        id,
        path: path.clone(),
        formatted,
        is_device: file.is_device,
        direct: file.direct,
        tail_path,
        thread,
        took: begun.elapsed(),
        report,
    };
    Ok(Opened {
        store: opened,
        fd: file.fd,
        tail: tail_name,
        report,
    })
}

/// Whether a file or device without a superblock is empty as far as its first MiB and last block tell.
fn looks_blank(disk: &mut FileDisk, size_bytes: u64) -> Result<bool, OpenError> {
    let mut start = AlignedBuf::zeroed(BOUNCE_BYTES);
    disk.read(0, &mut start)?;
    let mut end = AlignedBuf::blocks(1);
    let block = BLOCK_BYTES as u64;
    disk.read(size_bytes.saturating_sub(block) / block * block, &mut end)?;
    Ok(start.iter().chain(end.iter()).all(|byte| *byte == 0))
}

fn make_store(
    config: &DataConfig,
    store: &StoreConfig,
    file: &StoreFile,
    disk: &mut FileDisk,
) -> Result<StoreId, StartError> {
    let bytes = if file.is_device {
        file.size_bytes
    } else {
        store.capacity_bytes
    };
    let too_small = || StartError::TooSmall {
        path: store.path.clone(),
        bytes,
    };
    let geometry = Geometry::for_size(bytes, None).ok_or_else(too_small)?;
    let id = StoreId(Uuid::new_v4());
    let now_unix_ms = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64);
    tracing::info!(store = %id.0, path = %store.path.display(), bytes, "making a store");
    format_store(
        disk,
        geometry,
        id,
        config.node.0.into_bytes(),
        INITIAL_SEGMENTS,
        now_unix_ms,
    )
    .map_err(|source| {
        remove_if_made(file);
        StartError::Store {
            path: store.path.clone(),
            source,
        }
    })?;
    sync_directory(&store.path);
    Ok(id)
}

/// A file that could not be made into a store goes away again, so that the next start finds nothing strange.
fn remove_if_made(file: &StoreFile) {
    if file.created {
        let _ = std::fs::remove_file(&file.path);
    }
}

/// Makes the name of a new file durable.
fn sync_directory(path: &Path) {
    if let Some(dir) = path.parent() {
        let dir = if dir.as_os_str().is_empty() {
            Path::new(".")
        } else {
            dir
        };
        if let Err(error) = std::fs::File::open(dir).and_then(|dir| dir.sync_all()) {
            tracing::warn!(dir = %dir.display(), %error, "cannot sync the directory of a new store");
        }
    }
}
