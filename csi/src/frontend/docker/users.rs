//! Which containers use which volume, remembered over restarts of the plugin. A file a volume, replaced as a whole.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::refusal::Refusal;
use crate::stored;

/// The form of the files.
const VERSION: u32 = 1;

/// The directory of the files.
#[derive(Clone, Debug)]
pub struct Users {
    directory: PathBuf,
    boot_id: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    /// No container outlives the machine's run.
    boot_id: String,
    /// What the engine calls the volume.
    name: String,
    ids: BTreeSet<String>,
}

impl Users {
    /// Opens `directory`, making it when it is not there.
    pub fn open(directory: PathBuf, boot_id: String) -> io::Result<Users> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)?;
        Ok(Users { directory, boot_id })
    }

    fn path(&self, volume: Uuid) -> PathBuf {
        self.directory.join(format!("{volume}.json"))
    }

    /// The volume that users have under `name`, without asking the daemon.
    pub fn volume_of(&self, name: &str) -> Option<Uuid> {
        let entries = fs::read_dir(&self.directory).ok()?;
        entries.flatten().find_map(|entry| {
            let path = entry.path();
            let volume = path.file_stem()?.to_str()?.parse().ok()?;
            let record: Record = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
            let is_it =
                record.version == VERSION && record.boot_id == self.boot_id && record.name == name;
            is_it.then_some(volume)
        })
    }

    /// The ids of a volume's users. A file that makes no sense is an error: taking it for none would unmount a volume
    /// under its users.
    pub fn of(&self, volume: Uuid) -> Result<BTreeSet<String>, Refusal> {
        let path = self.path(volume);
        let wrong = |error: &dyn std::fmt::Display| {
            Refusal::internal(format!(
                "{}: {error}; when no container uses the volume, remove the file",
                path.display()
            ))
        };
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            Err(error) => return Err(wrong(&error)),
        };
        let record: Record = serde_json::from_slice(&bytes).map_err(|error| wrong(&error))?;
        if record.version != VERSION {
            return Err(wrong(&"of another version of this program"));
        }
        if record.boot_id != self.boot_id {
            return Ok(BTreeSet::new());
        }
        Ok(record.ids)
    }

    /// Remembers the ids of a volume's users; durable when this returns.
    pub fn set(&self, volume: Uuid, name: &str, ids: BTreeSet<String>) -> Result<(), Refusal> {
        let path = self.path(volume);
        let written = if ids.is_empty() {
            stored::remove(&path)
        } else {
            let record = Record {
                version: VERSION,
                boot_id: self.boot_id.clone(),
                name: name.to_owned(),
                ids,
            };
            stored::replace(&path, &record)
        };
        written.map_err(|error| Refusal::internal(format!("writing {}: {error}", path.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_remembered_until_the_machine_restarts() {
        let scratch = tempfile::tempdir().expect("a directory");
        let open = |boot: &str| {
            Users::open(scratch.path().join("users"), boot.to_owned()).expect("opened")
        };
        let (users, volume) = (open("one"), Uuid::from_u128(7));
        assert_eq!(users.of(volume), Ok(BTreeSet::new()));
        let ids = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        users.set(volume, "v", ids.clone()).expect("set");
        assert_eq!(open("one").of(volume), Ok(ids));
        assert_eq!(open("one").volume_of("v"), Some(volume));
        assert_eq!(open("one").volume_of("w"), None);
        assert_eq!(open("two").volume_of("v"), None);
        assert_eq!(open("two").of(volume), Ok(BTreeSet::new()));
        let path = scratch.path().join("users").join(format!("{volume}.json"));
        fs::write(&path, b"{\"version\":1").expect("written");
        users.of(volume).expect_err("half a file is not no users");
        users.set(volume, "v", BTreeSet::new()).expect("set");
        assert!(!path.exists());
        users
            .set(volume, "v", BTreeSet::new())
            .expect("gone already");
    }
}
