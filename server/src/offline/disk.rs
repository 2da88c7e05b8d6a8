//! A file or device that can only be read.

use std::{
    fs::{File, FileType, OpenOptions},
    io::{self, Seek},
    os::{
        fd::AsFd,
        unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    },
    path::Path,
};

use ashlar_core::{
    store::{AlignedBuf, BlockingDisk, DiskError, Errno},
    units::BLOCK_BYTES,
};
use rustix::fs::{FlockOperation, OFlags};

/// What every attempt to write is answered with; nothing that reads a store makes one.
const READ_ONLY: DiskError = DiskError(Errno(libc::EROFS));

/// An open file or device, by a descriptor that cannot write.
#[derive(Debug)]
pub(super) struct ReadOnlyDisk {
    file: File,
    in_use: bool,
}

pub(super) fn is_block_device(kind: &FileType) -> bool {
    kind.is_block_device()
}

impl ReadOnlyDisk {
    pub(super) fn open(path: &Path) -> io::Result<ReadOnlyDisk> {
        // Around the page cache where the file system allows it: a whole store would drive out everything else, and what is
        // on the device is the question.
        let direct = OFlags::DIRECT.bits() as i32;
        let file = match OpenOptions::new()
            .read(true)
            .custom_flags(direct)
            .open(path)
        {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => File::open(path)?,
            file => file?,
        };
        // Held while the store is read, so that no daemon starts to write to it meanwhile. A daemon that has it keeps it.
        let in_use = match rustix::fs::flock(file.as_fd(), FlockOperation::NonBlockingLockShared) {
            Ok(()) => false,
            Err(rustix::io::Errno::WOULDBLOCK) => true,
            Err(error) => return Err(error.into()),
        };
        Ok(ReadOnlyDisk { file, in_use })
    }

    pub(super) fn in_use(&self) -> bool {
        self.in_use
    }
}

fn disk_error(error: io::Error) -> DiskError {
    // The end of the file comes without a number.
    DiskError(error.raw_os_error().map_or(Errno::EIO, Errno))
}

impl BlockingDisk for ReadOnlyDisk {
    fn size_bytes(&mut self) -> Result<u64, DiskError> {
        // The metadata of a device have no length.
        self.file.seek(io::SeekFrom::End(0)).map_err(disk_error)
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let aligned = (buf.as_ptr() as usize).is_multiple_of(BLOCK_BYTES)
            && buf.len().is_multiple_of(BLOCK_BYTES)
            && offset.is_multiple_of(BLOCK_BYTES as u64);
        if aligned {
            return self.file.read_exact_at(buf, offset).map_err(disk_error);
        }
        let skip = (offset % BLOCK_BYTES as u64) as usize;
        let mut around = AlignedBuf::zeroed((skip + buf.len()).next_multiple_of(BLOCK_BYTES));
        self.file
            .read_exact_at(&mut around, offset - skip as u64)
            .map_err(disk_error)?;
        buf.copy_from_slice(&around[skip..skip + buf.len()]);
        Ok(())
    }

    fn write(&mut self, _offset: u64, _buf: &[u8]) -> Result<(), DiskError> {
        Err(READ_ONLY)
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        Err(READ_ONLY)
    }

    fn allocate(&mut self, _offset: u64, _len: u64) -> Result<(), DiskError> {
        Err(READ_ONLY)
    }
}
