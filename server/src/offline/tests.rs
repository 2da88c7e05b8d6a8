//! Over real files with stores that core laid out.

use std::{
    fs::{File, OpenOptions},
    os::{fd::AsFd, unix::fs::FileExt},
};

use ashlar_core::{
    store::{BlockingDisk, CheckFinding, DiskError, Errno, Geometry, format_store},
    units::StoreId,
};
use rustix::fs::FlockOperation;
use uuid::Uuid;

use super::*;

const STORE: Uuid = Uuid::from_u128(7);

/// A file that core may format.
struct Writable(File);

fn number(error: io::Error) -> DiskError {
    DiskError(Errno(error.raw_os_error().unwrap_or(libc::EIO)))
}

impl BlockingDisk for Writable {
    fn size_bytes(&mut self) -> Result<u64, DiskError> {
        self.0
            .metadata()
            .map(|metadata| metadata.len())
            .map_err(number)
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.0.read_exact_at(buf, offset).map_err(number)
    }

    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        self.0.write_all_at(buf, offset).map_err(number)
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        self.0.sync_data().map_err(number)
    }

    fn allocate(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        let end = offset + len;
        if self.0.metadata().map_err(number)?.len() < end {
            self.0.set_len(end).map_err(number)?;
        }
        Ok(())
    }
}

/// A new, empty store in a file of a directory.
fn format(directory: &Path, name: &str) -> PathBuf {
    let path = directory.join(name);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .expect("a new file");
    let geometry = Geometry::for_size(64 << 20, None).expect("large enough");
    format_store(
        &mut Writable(file),
        geometry,
        StoreId(STORE),
        [1; 16],
        4,
        1_700_000_000_000,
    )
    .expect("formats");
    path
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .expect("opens");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("reads");
    file.write_all_at(&[byte[0] ^ 0x10], at).expect("writes");
}

#[test]
fn a_store_is_found_by_its_file_and_by_its_directory() {
    let data = tempfile::tempdir().expect("a directory");
    let directory = data.path().join("stores");
    fs::create_dir(&directory).expect("a directory");
    let file = format(&directory, "0");
    fs::write(directory.join("notes.txt"), "nothing of ours").expect("writes");
    for path in [file.as_path(), &directory, data.path()] {
        let mut store = OfflineStore::open(path).expect("opens");
        assert_eq!(store.path(), file);
        assert!(!store.in_use());
        let inspection = store.inspect().expect("inspects");
        assert_eq!(inspection.store, StoreId(STORE));
        assert_eq!((inspection.frames, inspection.mapped_blocks), (0, 0));
        assert_eq!(store.check(|_, _| {}).expect("checks").findings, []);
    }
}

#[test]
fn reading_changes_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = format(directory.path(), "a");
    let before = fs::read(&file).expect("reads");
    let mut store = OfflineStore::open(&file).expect("opens");
    store.inspect().expect("inspects");
    store.check(|_, _| {}).expect("checks");
    assert!(store.disk.write(0, &[0; BLOCK_BYTES]).is_err() && store.disk.sync().is_err());
    assert!(fs::read(&file).expect("reads") == before);
}

#[test]
fn a_damaged_copy_of_the_superblock_is_reported_and_worked_around() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = format(directory.path(), "a");
    let mut store = OfflineStore::open(&file).expect("opens");
    let whole = store.inspect().expect("inspects");
    // Whichever generation is the newest, both of its copies are tried in turn.
    let mut reported = 0;
    for block in SUPERBLOCK_BLOCKS.into_iter().flatten() {
        let at = Addr(block).offset() + 100;
        flip(&file, at);
        let mut store = OfflineStore::open(directory.path()).expect("still found");
        assert_eq!(store.inspect().expect("still read"), whole);
        let findings = store.check(|_, _| {}).expect("checks").findings;
        reported += usize::from(findings.contains(&CheckFinding::SuperblockCopy(block)));
        flip(&file, at);
    }
    assert!(
        reported >= 2,
        "only {reported} damaged copies were reported"
    );
}

#[test]
fn what_is_no_store_says_so() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name);
    assert!(matches!(
        OfflineStore::open(&path("nothing")),
        Err(OfflineError::Missing { .. })
    ));
    assert!(matches!(
        OfflineStore::open(directory.path()),
        Err(OfflineError::NoStore { .. })
    ));
    assert!(matches!(
        OfflineStore::open(Path::new("/dev/null")),
        Err(OfflineError::WrongType { .. })
    ));
    fs::write(path("zeros"), vec![0; 1 << 20]).expect("writes");
    let mut zeros = OfflineStore::open(&path("zeros")).expect("opens");
    assert_eq!(zeros.inspect(), Err(OpenError::NotAStore));
    fs::write(path("short"), "short").expect("writes");
    assert!(
        OfflineStore::open(&path("short"))
            .expect("opens")
            .inspect()
            .is_err()
    );
    format(directory.path(), "a");
    format(directory.path(), "b");
    let error = OfflineStore::open(directory.path()).expect_err("two stores");
    assert!(
        matches!(&error, OfflineError::Several { names, .. } if names.len() == 2),
        "{error}"
    );
}

#[test]
fn a_store_in_use_is_read_and_said_to_be() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = format(directory.path(), "a");
    let daemon = File::open(&file).expect("opens");
    rustix::fs::flock(daemon.as_fd(), FlockOperation::NonBlockingLockExclusive).expect("locks");
    let mut store = OfflineStore::open(&file).expect("opens all the same");
    assert!(store.in_use());
    store.inspect().expect("inspects");
    drop(daemon);
    assert!(!OfflineStore::open(&file).expect("opens").in_use());
}
