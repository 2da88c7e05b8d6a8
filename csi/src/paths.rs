//! Paths that come from a caller: believed only when they lie where they may, with no way around.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

use crate::refusal::Refusal;

/// The kernel's bound on a path.
const PATH_BYTES_MAX: usize = 4095;

/// Directories below which callers may name paths.
#[derive(Clone, Debug)]
pub struct Roots {
    roots: Vec<Root>,
}

#[derive(Clone, Debug)]
struct Root {
    /// As an administrator, and callers, name it.
    given: PathBuf,
    /// Where that leads, as the kernel's table of mounts has it.
    real: PathBuf,
}

/// What lies at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Missing,
    /// A directory.
    Directory,
    /// A file or a device.
    File,
    /// A symbolic link; never followed.
    Link,
}

impl Roots {
    /// Paths strictly below one of `roots`, which are absolute. Where they lead is found out now and never again.
    pub fn new(roots: Vec<PathBuf>) -> Roots {
        let roots = roots.into_iter().map(|given| Root {
            real: real(&given),
            given,
        });
        Roots {
            roots: roots.collect(),
        }
    }

    /// The real path of one that a caller named below a root, unchecked; any other one stays as it is.
    pub fn real(&self, path: &Path) -> PathBuf {
        self.below(path)
            .map_or_else(|| path.to_owned(), |(_, real)| real)
    }

    /// The root that a path lies strictly below, and its real path.
    fn below(&self, path: &Path) -> Option<(&Root, PathBuf)> {
        self.roots.iter().find_map(|root| {
            let rest = path
                .strip_prefix(&root.given)
                .or_else(|_| path.strip_prefix(&root.real))
                .ok()?;
            rest.components().next()?;
            Some((root, root.real.join(rest)))
        })
    }

    /// Checks a path that a caller named `what`: absolute, in its plain form (no `.`, `..` or doubled slashes), below one
    /// of the roots, and reached from there through no symbolic link. The last part, and its parents, need not exist. Answers
    /// the real path, which is another one where the root is a link.
    ///
    /// The root itself may be a link: an administrator chose it. What lies below is made by orchestrators and pods.
    pub fn check(&self, what: &str, path: &str) -> Result<PathBuf, Refusal> {
        if path.is_empty() {
            return Err(Refusal::invalid(format!("{what} is missing")));
        }
        if path.len() > PATH_BYTES_MAX || path.bytes().any(|byte| byte < 0x20 || byte == 0x7f) {
            return Err(Refusal::invalid(format!(
                "{what} is too long or has control characters"
            )));
        }
        let plain: PathBuf = Path::new(path).components().collect();
        let steps_back = plain.components().any(|part| part == Component::ParentDir);
        if !path.starts_with('/')
            || steps_back
            || plain.as_os_str() != OsStr::new(path.trim_end_matches('/'))
        {
            return Err(Refusal::invalid(format!(
                "{what} {path:?} is not an absolute path in its plain form"
            )));
        }
        let Some((root, real)) = self.below(&plain) else {
            return Err(Refusal::invalid(format!(
                "{what} {path:?} does not lie below {}",
                self.roots
                    .iter()
                    .map(|root| root.given.display().to_string())
                    .collect::<Vec<_>>()
                    .join(" or ")
            )));
        };
        no_links(&root.real, &real).map_err(|error| {
            Refusal::invalid(format!("{what} {path:?} cannot be used: {error}"))
        })?;
        Ok(real)
    }
}

/// Where a path leads, as far as there is something.
fn real(path: &Path) -> PathBuf {
    if let Ok(real) = path.canonicalize() {
        return real;
    }
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => real(parent).join(name),
        _ => path.to_owned(),
    }
}

/// Walks from `root` to `path` without following a link, as far as there is something.
fn no_links(root: &Path, path: &Path) -> io::Result<()> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let start = match openat2(CWD, root, directory, Mode::empty(), ResolveFlags::empty()) {
        Ok(start) => start,
        // A root that is not there yet has nothing below it that could mislead.
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let below = path.strip_prefix(root).map_err(io::Error::other)?;
    let mut so_far = PathBuf::new();
    for part in below.components() {
        so_far.push(part);
        let strict =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        // Without NOFOLLOW, which would make a link at the end a thing that may be opened.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        match openat2(&start, &so_far, flags, Mode::empty(), strict) {
            Ok(_) => {}
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            Err(rustix::io::Errno::LOOP) => {
                return Err(io::Error::other(format!(
                    "{} is a symbolic link",
                    root.join(&so_far).display()
                )));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// What lies at `path`, without following a link at its end.
pub fn kind(path: &Path) -> io::Result<Kind> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => Ok(Kind::Directory),
        Ok(found) if found.is_symlink() => Ok(Kind::Link),
        Ok(_) => Ok(Kind::File),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Kind::Missing),
        Err(error) => Err(error),
    }
}

/// Makes a directory, with mode 0750 as the kubelet does; one that is there is fine.
pub fn make_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    match std::fs::DirBuilder::new().mode(0o750).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match kind(path)? {
            Kind::Directory => Ok(()),
            _ => Err(io::Error::other("it is there and no directory")),
        },
        made => made,
    }
}

/// Makes an empty file to mount a device on; one that is there is fine.
pub fn make_file(path: &Path) -> io::Result<()> {
    match kind(path)? {
        Kind::File => Ok(()),
        Kind::Missing => {
            let _: File = OpenOptions::new().write(true).create_new(true).open(path)?;
            Ok(())
        }
        Kind::Directory | Kind::Link => Err(io::Error::other("it is there and no file")),
    }
}

/// Removes an empty directory or a file; what is not there is fine. Refuses to remove a directory with something in it:
/// that would be somebody's data.
pub fn remove(path: &Path) -> io::Result<()> {
    let removed = match kind(path)? {
        Kind::Missing => return Ok(()),
        Kind::Directory => std::fs::remove_dir(path),
        Kind::File | Kind::Link => std::fs::remove_file(path),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// True when a string fits into a file name as it is.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && !matches!(name, "." | "..")
        && !OsStr::new(name)
            .as_bytes()
            .iter()
            .any(|byte| *byte == b'/' || *byte < 0x20 || *byte == 0x7f)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refusal::Class;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_plain_paths_below_a_root_are_believed() {
        let scratch = tempfile::tempdir().expect("a directory");
        let root = scratch.path().canonicalize().expect("real").join("kubelet");
        std::fs::create_dir_all(root.join("pods/a")).expect("made");
        std::fs::write(root.join("pods/file"), b"").expect("made");
        symlink("/etc", root.join("pods/link")).expect("made");
        symlink("a", root.join("pods/near")).expect("made");
        let roots = Roots::new(vec![root.clone()]);
        let base = root.to_str().expect("text").to_owned();
        for good in [
            "pods",
            "pods/a",
            "pods/a/mount",
            "pods/not/there/yet",
            "pods/file",
        ] {
            let path = format!("{base}/{good}");
            assert_eq!(
                roots.check("target", &path),
                Ok(PathBuf::from(&path)),
                "{good}"
            );
        }
        assert!(roots.check("target", &format!("{base}/pods/a/")).is_ok());
        for bad in [
            String::new(),
            "some/path".into(),
            "/".into(),
            "/etc/passwd".into(),
            base.clone(),
            format!("{base}x/pods"),
            format!("{base}/../kubelet/pods"),
            format!("{base}/./pods"),
            format!("{base}//pods"),
            format!("{base}/pods/link"),
            format!("{base}/pods/link/passwd"),
            format!("{base}/pods/near/mount"),
            format!("{base}/pods/file/below"),
            format!("{base}/pods/a\nb"),
            format!("{base}/{}", "a/".repeat(2100)),
        ] {
            let refused = roots.check("target", &bad).expect_err(&bad);
            assert_eq!(refused.class, Class::InvalidArgument, "{bad}");
        }
    }

    #[test]
    fn a_root_that_is_a_link_is_followed_and_nothing_below_it() {
        let scratch = tempfile::tempdir().expect("a directory");
        let base = scratch.path().canonicalize().expect("real");
        std::fs::create_dir_all(base.join("disk/kubelet/pods")).expect("made");
        symlink(base.join("disk"), base.join("var")).expect("made");
        symlink("/etc", base.join("disk/kubelet/link")).expect("made");
        let given = base.join("var/kubelet");
        let roots = Roots::new(vec![given.clone(), base.join("var/none/yet")]);
        let text = |path: &Path| path.to_str().expect("text").to_owned();
        let pods = base.join("disk/kubelet/pods");
        for named in [given.join("pods"), pods.clone()] {
            assert_eq!(roots.check("target", &text(&named)), Ok(pods.clone()));
            assert_eq!(roots.real(&named), pods);
        }
        let later = base.join("var/none/yet/pods");
        let real = base.join("disk/none/yet/pods");
        assert_eq!(roots.check("target", &text(&later)), Ok(real));
        let link = text(&given.join("link/passwd"));
        assert!(roots.check("target", &link).is_err());
        assert_eq!(
            roots.real(Path::new("/etc/passwd")),
            Path::new("/etc/passwd")
        );
    }

    #[test]
    fn targets_come_and_go() {
        let scratch = tempfile::tempdir().expect("a directory");
        let (directory, file) = (scratch.path().join("d"), scratch.path().join("f"));
        make_directory(&directory).expect("made");
        make_directory(&directory).expect("there");
        make_file(&file).expect("made");
        make_file(&file).expect("there");
        assert!(make_file(&directory).is_err() && make_directory(&file).is_err());
        std::fs::write(directory.join("data"), b"x").expect("written");
        assert!(remove(&directory).is_err(), "data is not removed");
        std::fs::remove_file(directory.join("data")).expect("removed");
        for path in [&directory, &file, &directory] {
            remove(path).expect("gone");
            assert_eq!(kind(path).expect("asked"), Kind::Missing);
        }
        symlink("/etc", &file).expect("made");
        assert_eq!(kind(&file).expect("asked"), Kind::Link);
        remove(&file).expect("the link goes");
        assert!(Path::new("/etc").is_dir());
    }
}
