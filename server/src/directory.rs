//! What is wrong with a directory that a setting names, in words that say what to do.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why a directory cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DirectoryProblem {
    /// Nobody made it, or what it lies on is not mounted.
    #[error("the directory {} does not exist; make it (or mount what it lies on), or name another", .0.display())]
    Missing(PathBuf),
    /// Something else has its name, or that of a directory above it.
    #[error("{} is not a directory; move it away, or name another", .0.display())]
    NotADirectory(PathBuf),
}

impl DirectoryProblem {
    /// Of a directory that must be there already. `None`: it is there, or the system says something else about it.
    pub fn of(dir: &Path) -> Option<DirectoryProblem> {
        match std::fs::metadata(dir) {
            Ok(there) if there.is_dir() => None,
            Ok(_) => Some(DirectoryProblem::NotADirectory(dir.to_owned())),
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound => Some(DirectoryProblem::Missing(dir.to_owned())),
                io::ErrorKind::NotADirectory => DirectoryProblem::in_the_way_of(dir),
                _ => None,
            },
        }
    }

    /// Of a directory that is made where it is missing: only what lies in its way.
    pub fn in_the_way_of(dir: &Path) -> Option<DirectoryProblem> {
        let nearest = dir
            .ancestors()
            .find_map(|above| Some((above, std::fs::metadata(above).ok()?)))?;
        match nearest {
            (_, there) if there.is_dir() => None,
            (path, _) => Some(DirectoryProblem::NotADirectory(path.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_and_what_is_in_the_way_is_named() {
        let scratch = tempfile::tempdir().expect("temporary directory");
        let (dir, file) = (scratch.path(), scratch.path().join("file"));
        std::fs::write(&file, b"").expect("write");
        assert_eq!(DirectoryProblem::of(dir), None);
        let (missing, below) = (dir.join("a/b"), file.join("a/b"));
        assert_eq!(
            DirectoryProblem::of(&missing),
            Some(DirectoryProblem::Missing(missing.clone()))
        );
        assert_eq!(DirectoryProblem::in_the_way_of(&missing), None);
        let in_the_way = Some(DirectoryProblem::NotADirectory(file.clone()));
        assert_eq!(DirectoryProblem::of(&file), in_the_way);
        assert_eq!(DirectoryProblem::of(&below), in_the_way);
        assert_eq!(DirectoryProblem::in_the_way_of(&below), in_the_way);
    }
}
