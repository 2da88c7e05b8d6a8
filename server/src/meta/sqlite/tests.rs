use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use rusqlite::Connection;

use super::*;
use crate::meta::{WatchEnd, conformance};

struct Files {
    dir: tempfile::TempDir,
    count: AtomicU32,
}

impl Files {
    fn path(&self, number: u32) -> PathBuf {
        self.dir.path().join(format!("{number}.db"))
    }
}

#[async_trait]
impl conformance::Subject for Files {
    async fn empty(&self) -> Arc<dyn MetadataStore> {
        let number = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        Arc::new(SqliteStore::open(&self.path(number)).expect("open"))
    }

    async fn reopen(&self, store: Arc<dyn MetadataStore>) -> Arc<dyn MetadataStore> {
        drop(store);
        let newest = self.count.load(Ordering::Relaxed);
        Arc::new(SqliteStore::open(&self.path(newest)).expect("reopen"))
    }
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("metadata.db");
    (dir, path)
}

#[tokio::test]
async fn sqlite_conforms() {
    let dir = tempfile::tempdir().expect("temporary directory");
    conformance::check_all(&Files {
        dir,
        count: AtomicU32::new(0),
    })
    .await;
}

#[test]
fn a_second_opener_is_refused_until_the_first_is_gone() {
    let (_dir, path) = scratch();
    let first = SqliteStore::open(&path).expect("open");
    assert_eq!(
        SqliteStore::open(&path).err(),
        Some(OpenError::InUse { path: path.clone() })
    );
    drop(first);
    SqliteStore::open(&path).expect("free again");
}

#[test]
fn a_file_of_something_else_is_refused_and_left_alone() {
    let (_dir, path) = scratch();
    std::fs::write(&path, b"dear diary").expect("write");
    assert!(matches!(
        SqliteStore::open(&path),
        Err(OpenError::Foreign { .. })
    ));
    assert_eq!(std::fs::read(&path).expect("read"), b"dear diary");

    std::fs::remove_file(&path).expect("remove");
    let other = Connection::open(&path).expect("open");
    other
        .execute_batch("CREATE TABLE recipes (name TEXT)")
        .expect("create");
    other.close().expect("close");
    let before = std::fs::read(&path).expect("read");
    assert!(matches!(
        SqliteStore::open(&path),
        Err(OpenError::Foreign { .. })
    ));
    assert_eq!(std::fs::read(&path).expect("read"), before);
}

#[test]
fn a_directory_in_its_place_is_an_error_and_not_a_panic() {
    let (_dir, path) = scratch();
    std::fs::create_dir(&path).expect("create");
    assert!(matches!(
        SqliteStore::open(&path),
        Err(OpenError::Io { .. } | OpenError::Foreign { .. })
    ));
}

#[test]
fn a_newer_file_is_refused() {
    let (_dir, path) = scratch();
    drop(SqliteStore::open(&path).expect("open"));
    let newer = Connection::open(&path).expect("open");
    newer
        .pragma_update(None, "user_version", 7)
        .expect("pragma");
    newer.close().expect("close");
    assert_eq!(
        SqliteStore::open(&path).err(),
        Some(OpenError::Newer {
            path,
            found: 7,
            known: 1
        })
    );
}

#[tokio::test]
async fn damage_is_told_and_not_served() {
    let (_dir, path) = scratch();
    let store = SqliteStore::open(&path).expect("open");
    for number in 0..200 {
        let put = Transaction::new().put(format!("k{number}"), vec![0x5a; 500]);
        store.commit(put).await.expect("commit");
    }
    drop(store);
    let mut bytes = std::fs::read(&path).expect("read");
    let half = bytes.len() / 2;
    bytes[4096..half].fill(0xff);
    std::fs::write(&path, bytes).expect("write");
    assert!(matches!(
        SqliteStore::open(&path),
        Err(OpenError::Corrupt { .. })
    ));
}

#[tokio::test]
async fn the_file_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, path) = scratch();
    let store = SqliteStore::open(&path).expect("open");
    store
        .commit(Transaction::new().put("a", vec![]))
        .await
        .expect("commit");
    for entry in std::fs::read_dir(dir.path()).expect("list") {
        let entry = entry.expect("entry");
        let mode = entry.metadata().expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{:?}", entry.path());
    }
}

#[tokio::test]
async fn a_watcher_that_does_not_read_is_told_that_it_lagged() {
    let (_dir, path) = scratch();
    let store = SqliteStore::open(&path).expect("open");
    let mut watch = store.watch("", Revision(0)).await.expect("watch");
    let mut committed = 0;
    for _ in 0..1100 {
        store
            .commit(Transaction::new().put("a", vec![]))
            .await
            .expect("commit");
        committed += 1;
    }
    let mut seen = 0;
    let end = loop {
        match watch.next().await {
            Ok(batch) => {
                seen += 1;
                assert_eq!(batch.revision.0, seen);
            }
            Err(end) => break end,
        }
    };
    assert_eq!(end, WatchEnd::Lagged);
    assert!(seen < committed);
    // From where it was, the watcher catches up.
    let mut watch = store.watch("", Revision(seen)).await.expect("watch");
    for revision in seen + 1..=committed {
        assert_eq!(watch.next().await.expect("caught up").revision.0, revision);
    }
    drop(store);
    assert_eq!(watch.next().await, Err(WatchEnd::Closed));
}
