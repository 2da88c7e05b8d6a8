//! Which stores a daemon opens: what is configured, held against what was there before.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use ashlar_core::records::{
    OpenedAs, Record, StoreRecord, Transaction, Versioned, answers_may_be_gone, keys,
};
use ashlar_core::units::{NodeId, StoreId};
use uuid::Uuid;

use crate::config::{ByteCount, Config};
use crate::data::{OpenedStore, StoreConfig};
use crate::directory::DirectoryProblem;
use crate::meta::{self, MetadataError, MetadataStore};
use crate::tail::boot_id;
use crate::volumes::unix_ms;

/// Share of a filesystem's free space that a new store without a size may grow to. The rest is for the metadata, logs
/// and whatever else lives there; a full root filesystem is worse than a smaller store.
const FREE_SPACE_SHARE: f64 = 0.8;
/// What a store is called in a directory that was named instead of a file.
const FILE_IN_DIRECTORY: &str = "store";

/// Why the stores cannot be laid out.
#[derive(Debug, thiserror::Error)]
pub enum StoreSetupError {
    /// The system refused.
    #[error("store {}: {what}: {source}", path.display())]
    Io {
        /// As configured.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The directory of its file cannot be made.
    #[error("--store {}: {problem}", path.display())]
    Directory {
        /// As configured.
        path: PathBuf,
        /// What is in the way.
        problem: DirectoryProblem,
    },
    /// A file among the devices would be kept in memory and be gone after a restart of the machine.
    #[error("--store {}: there is no such device; look for its name (lsblk), or name a directory outside /dev", path.display())]
    NoDevice {
        /// As configured.
        path: PathBuf,
    },
    /// Two settings lead to one file.
    #[error("--store {} and --store {} are the same file or device", first.display(), second.display())]
    Same {
        /// One setting.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
}

/// Every store that was ever opened by this daemon, `node`. In a cluster the others' are recorded beside them.
pub(super) async fn recorded(
    store: &dyn MetadataStore,
    node: NodeId,
) -> Result<Vec<Versioned<StoreRecord>>, MetadataError> {
    let listing = store.list(keys::STORES).await?;
    let all = listing.entries.iter().map(|entry| entry.read());
    let is_own = |record: &StoreRecord| record.node.is_none_or(|owner| owner == node);
    all.filter(|read: &Result<Versioned<StoreRecord>, _>| {
        read.as_ref().map_or(true, |found| is_own(&found.record))
    })
    .collect()
}

/// What the data plane is to open. Directories for store files are made.
pub(super) fn lay_out(
    config: &Config,
    known: &[Versioned<StoreRecord>],
) -> Result<Vec<StoreConfig>, StoreSetupError> {
    let mut stores = Vec::new();
    let mut seen: HashMap<PathBuf, PathBuf> = HashMap::new();
    let mut new_on_filesystem: HashMap<u64, u64> = HashMap::new();
    for setting in &config.stores {
        let failed = |what| {
            move |source| StoreSetupError::Io {
                path: setting.path.clone(),
                what,
                source,
            }
        };
        let path = match std::fs::metadata(&setting.path) {
            Ok(there) if there.is_dir() => setting.path.join(FILE_IN_DIRECTORY),
            _ => setting.path.clone(),
        };
        let directory = path.parent().unwrap_or(Path::new("/"));
        if is_among_devices(&path) && !path.exists() {
            return Err(StoreSetupError::NoDevice { path });
        }
        if let Some(problem) = DirectoryProblem::in_the_way_of(directory) {
            return Err(StoreSetupError::Directory { path, problem });
        }
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(failed("its directory cannot be made"))?;
        // Links are followed, so that one file under two names is not taken for two stores.
        let real = directory
            .canonicalize()
            .map_err(failed("its directory cannot be found"))?;
        let real = path
            .file_name()
            .map_or(real.clone(), |name| real.join(name));
        let real = real.canonicalize().unwrap_or(real);
        if let Some(first) = seen.insert(real, setting.path.clone()) {
            return Err(StoreSetupError::Same {
                first,
                second: setting.path.clone(),
            });
        }
        if !path.exists() {
            let filesystem = std::fs::metadata(directory)
                .map_err(failed("its directory cannot be read"))?
                .dev();
            *new_on_filesystem.entry(filesystem).or_default() += 1;
        }
        let asked = setting
            .size
            .map(|ByteCount(bytes)| bytes)
            .or(config.store_size_bytes);
        stores.push((path, asked));
    }
    let resolved = stores.into_iter().map(|(path, asked)| {
        let capacity_bytes = match asked {
            Some(bytes) => bytes,
            None => default_capacity(&path, &new_on_filesystem).map_err(|source| {
                StoreSetupError::Io {
                    path: path.clone(),
                    what: "its free space cannot be told",
                    source,
                }
            })?,
        };
        let expected = known
            .iter()
            .find(|store| Path::new(&store.record.path) == path)
            .map(|store| store.record.id);
        Ok(StoreConfig {
            path,
            expected,
            capacity_bytes,
        })
    });
    resolved.collect()
}

/// Where a name that is not there is a device's: everywhere below /dev but in its shared memory.
fn is_among_devices(path: &Path) -> bool {
    path.starts_with("/dev") && !path.starts_with("/dev/shm")
}

/// How large a new store may grow when nobody said: a share of what is free, divided by the new stores that are to be
/// made on the same filesystem. A device is used whole, and a store that exists keeps its size.
fn default_capacity(path: &Path, new_on_filesystem: &HashMap<u64, u64>) -> io::Result<u64> {
    if std::fs::metadata(path).is_ok_and(|there| there.file_type().is_block_device()) {
        return Ok(u64::MAX);
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    let space = rustix::fs::statvfs(directory)?;
    let free_bytes = space.f_bavail.saturating_mul(space.f_frsize);
    let sharers = new_on_filesystem
        .get(&std::fs::metadata(directory)?.dev())
        .copied()
        .unwrap_or(1)
        .max(1);
    Ok((free_bytes as f64 * FREE_SPACE_SHARE) as u64 / sharers)
}

/// Writes down where each store was opened, and by whom when there can be others. Answers the stores that are recorded and were not opened this time.
pub(super) async fn record(
    store: &dyn MetadataStore,
    known: &[Versioned<StoreRecord>],
    opened: &[OpenedStore],
    node: Option<NodeId>,
) -> Result<Vec<StoreRecord>, MetadataError> {
    let mut transaction = Transaction::new();
    for store in opened {
        let path = store.path.display().to_string();
        let earlier = known.iter().find(|known| known.record.id == store.id);
        if earlier
            .is_some_and(|earlier| (&earlier.record.path, earlier.record.node) == (&path, node))
        {
            continue;
        }
        let first_seen_unix_ms =
            earlier.map_or_else(unix_ms, |earlier| earlier.record.first_seen_unix_ms);
        let record = StoreRecord {
            id: store.id,
            path,
            node,
            first_seen_unix_ms,
            boot: earlier.and_then(|earlier| earlier.record.boot),
        };
        transaction = transaction.put(keys::store(store.id), record.encode());
    }
    if !transaction.effects.is_empty() {
        store.commit(transaction).await?;
    }
    let missing = known
        .iter()
        .filter(|known| opened.iter().all(|opened| opened.id != known.record.id));
    Ok(missing.map(|missing| missing.record.clone()).collect())
}

/// This run of the machine's kernel. Where it cannot be told no tail is believed either.
fn this_boot() -> Uuid {
    boot_id().map_or(Uuid::nil(), Uuid::from_bytes)
}

/// Opened stores from which answered writes may be gone.
pub(super) fn that_lost_answers(
    known: &[Versioned<StoreRecord>],
    opened: &[OpenedStore],
) -> BTreeSet<StoreId> {
    let boot = this_boot();
    let lost = opened.iter().filter(|store| {
        let earlier = known.iter().find(|known| known.record.id == store.id);
        let opened_as = OpenedAs {
            boot,
            was_closed: store.report.clean,
            tail_is_void: store.report.tail_void,
        };
        answers_may_be_gone(earlier.map(|earlier| &earlier.record), opened_as)
    });
    lost.map(|store| store.id).collect()
}

/// Writes down that the volumes of these stores are served in this run of the kernel.
pub(super) async fn record_boot(
    store: &dyn MetadataStore,
    opened: &[OpenedStore],
) -> Result<(), MetadataError> {
    let boot = Some(this_boot());
    let mut transaction = Transaction::new();
    for opened in opened {
        let key = keys::store(opened.id);
        let found = meta::read::<StoreRecord>(store, &key).await?;
        let Some(found) = found.filter(|found| found.record.boot != boot) else {
            continue;
        };
        let record = StoreRecord {
            boot,
            ..found.record
        };
        transaction = transaction
            .when_unchanged(key.clone(), found.changed_at)
            .put(key, record.encode());
    }
    if !transaction.effects.is_empty() {
        // Somebody who was faster only leaves it to the next start to tell the clients once more.
        store.commit(transaction).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Arguments, Config};
    use ashlar_core::records::Revision;
    use ashlar_core::units::StoreId;
    use clap::Parser;

    fn config(dir: &Path, stores: &[&str]) -> Config {
        let mut flags = vec![
            "ashlard".to_owned(),
            format!("--data-dir={}", dir.display()),
        ];
        flags.extend(
            stores
                .iter()
                .map(|store| format!("--store={}/{store}", dir.display())),
        );
        Config::resolve(&Arguments::parse_from(flags)).expect("config")
    }

    #[test]
    fn a_store_that_was_here_before_is_expected_again() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let id = StoreId(uuid::Uuid::from_u128(3));
        let path = dir.path().join("stores/0").display().to_string();
        let known = Versioned {
            record: StoreRecord {
                id,
                path,
                node: None,
                first_seen_unix_ms: 0,
                boot: None,
            },
            changed_at: Revision(1),
        };
        let stores = lay_out(&config(dir.path(), &[]), &[known]).expect("layout");
        assert_eq!(stores[0].expected, Some(id));
        assert!(stores[0].capacity_bytes > 0);
        assert!(dir.path().join("stores").is_dir());
    }

    #[test]
    fn a_directory_gets_a_file_and_sizes_are_taken() {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::create_dir(dir.path().join("disk")).expect("create");
        let stores =
            lay_out(&config(dir.path(), &["disk,size=3GiB", "other"]), &[]).expect("layout");
        assert_eq!(
            (stores[0].path.clone(), stores[0].capacity_bytes),
            (dir.path().join("disk/store"), 3 << 30)
        );
        assert_eq!(stores[1].path, dir.path().join("other"));
    }

    #[test]
    fn a_path_that_cannot_be_made_is_told() {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::write(dir.path().join("file"), b"").expect("write");
        let refusal = lay_out(&config(dir.path(), &["file/s"]), &[])
            .expect_err("a file in the way")
            .to_string();
        let right = format!("{} is not a directory", dir.path().join("file").display());
        assert!(refusal.contains(&right), "{refusal}");
        let mut config = config(dir.path(), &[]);
        config.stores[0].path = PathBuf::from("/dev/no-such-disk/part1");
        let refusal = lay_out(&config, &[]).expect_err("no device").to_string();
        assert!(
            refusal.contains("/dev/no-such-disk/part1: there is no such device"),
            "{refusal}"
        );
        assert!(!Path::new("/dev/no-such-disk").exists());
    }

    #[test]
    fn one_file_under_two_names_is_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::create_dir(dir.path().join("a")).expect("create");
        std::os::unix::fs::symlink(dir.path().join("a"), dir.path().join("b")).expect("link");
        let refusal = lay_out(&config(dir.path(), &["a/s", "b/s"]), &[])
            .expect_err("the same")
            .to_string();
        assert!(refusal.contains("the same file"), "{refusal}");
    }
}
