//! What is mounted where: `/proc/self/mountinfo` (proc(5)).

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Identifies it while it lasts.
    pub id: u64,
    /// Device number of the file system.
    pub device: (u32, u32),
    /// Which part of the file system is seen here.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// Options of this mount, comma-separated.
    pub options: String,
    /// Type of the file system.
    pub kind: String,
    /// What was mounted, as it was named.
    pub source: PathBuf,
    /// Options of the file system itself, comma-separated.
    pub super_options: String,
}

impl Mount {
    /// True when nothing can be written through this mount, be it for the mount or for the file system.
    pub fn is_read_only(&self) -> bool {
        has_option(&self.options, "ro") || self.is_file_system_read_only()
    }

    /// True when the file system itself takes no writes, as after an error that made it give up. An ext4 of newer kernels does
    /// not become `ro` then; from Linux 6.15 on it says `emergency_ro`, or `shutdown` where it answers nothing any more.
    pub fn is_file_system_read_only(&self) -> bool {
        ["ro", "emergency_ro", "shutdown"]
            .iter()
            .any(|option| self.has_file_system_option(option))
    }

    /// Whether the file system has this option.
    pub fn has_file_system_option(&self, wanted: &str) -> bool {
        has_option(&self.super_options, wanted)
    }

    /// Whether the mount has this option.
    pub fn has_option(&self, wanted: &str) -> bool {
        has_option(&self.options, wanted)
    }
}

fn has_option(options: &str, wanted: &str) -> bool {
    options.split(',').any(|option| option == wanted)
}

/// All mounts of this process's namespace, in the order in which they were made.
#[derive(Clone, Debug, Default)]
pub struct Mounts {
    all: Vec<Mount>,
}

impl Mounts {
    /// As they are now.
    pub fn read() -> io::Result<Mounts> {
        let bytes = std::fs::read("/proc/self/mountinfo")?;
        Ok(Mounts::parse(&bytes))
    }

    /// Lines that make no sense are left out: a later kernel may write kinds of lines that are not known here.
    fn parse(bytes: &[u8]) -> Mounts {
        Mounts {
            all: bytes
                .split(|byte| *byte == b'\n')
                .filter_map(line)
                .collect(),
        }
    }

    /// What one sees at `path`: the last of those mounted exactly there.
    pub fn at(&self, path: &Path) -> Option<&Mount> {
        self.all.iter().rev().find(|mount| mount.point == path)
    }

    /// How many mounts lie on top of one another at `path`.
    pub fn depth(&self, path: &Path) -> usize {
        self.all.iter().filter(|mount| mount.point == path).count()
    }

    /// Every mount of a device's file system.
    pub fn of_device(&self, device: (u32, u32)) -> impl Iterator<Item = &Mount> {
        self.all.iter().filter(move |mount| mount.device == device)
    }

    /// Every place where the node of a device (`nbd0`) is bound, as raw block volumes are.
    pub fn of_node(&self, name: &str) -> impl Iterator<Item = &Mount> {
        let root = Path::new("/").join(name);
        self.all
            .iter()
            .filter(move |mount| mount.kind == "devtmpfs" && mount.root == root)
    }

    /// Every mount.
    pub fn all(&self) -> &[Mount] {
        &self.all
    }
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn line(bytes: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = bytes.split(|byte| *byte == b' ').collect();
    // The optional fields between the options and the dash vary in number.
    let dash = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
    let text = |at: usize| -> Option<String> {
        Some(String::from_utf8_lossy(fields.get(at)?).into_owned())
    };
    let number = text(2)?;
    let (major, minor) = number.split_once(':')?;
    Some(Mount {
        id: text(0)?.parse().ok()?,
        device: (major.parse().ok()?, minor.parse().ok()?),
        root: unescape(fields.get(3)?),
        point: unescape(fields.get(4)?),
        options: text(5)?,
        kind: text(dash + 1)?,
        source: unescape(fields.get(dash + 2)?),
        super_options: text(dash + 3)?,
    })
}

/// Blanks, tabs, newlines and backslashes stand as `\040` and the like.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'))
            }
            _ => None,
        };
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"22 1 254:0 / / rw,relatime - ext4 /dev/root rw\n\
        36 22 43:0 / /var/a\\040b rw,noatime shared:1 master:2 - ext4 /dev/nbd0 rw,errors=remount-ro\n\
        37 22 43:0 / /pods/x ro,noatime shared:1 - ext4 /dev/nbd0 rw\n\
        38 22 43:0 / /pods/x rw - xfs /dev/nbd0 ro,attr2\n\
        39 22 0:5 /nbd1 /pods/\\134dev rw - devtmpfs udev rw\n\
        rubbish\n40 22 x:y / / rw - a b c\n\n";

    #[test]
    fn mounts_are_read() {
        let mounts = Mounts::parse(TABLE);
        assert_eq!(mounts.all().len(), 5);
        let blank = mounts.at(Path::new("/var/a b")).expect("there");
        assert_eq!((blank.device, blank.kind.as_str()), ((43, 0), "ext4"));
        assert_eq!(blank.source, Path::new("/dev/nbd0"));
        assert!(!blank.is_read_only());
        let top = mounts.at(Path::new("/pods/x")).expect("there");
        assert_eq!(top.id, 38);
        assert!(top.is_read_only() && top.is_file_system_read_only());
        for (option, gave_up) in [
            ("emergency_ro", true),
            ("shutdown", true),
            ("errors=remount-ro", false),
        ] {
            let mount = Mount {
                super_options: format!("rw,{option}"),
                ..blank.clone()
            };
            assert_eq!(mount.is_file_system_read_only(), gave_up, "{option}");
        }
        assert_eq!(mounts.depth(Path::new("/pods/x")), 2);
        assert_eq!(mounts.of_device((43, 0)).count(), 3);
        let node = mounts.at(Path::new("/pods/\\dev")).expect("there");
        assert_eq!(node.root, Path::new("/nbd1"));
        assert_eq!(mounts.of_node("nbd1").count(), 1);
        assert_eq!(mounts.of_node("nbd0").count(), 0);
        let first = mounts.of_device((43, 0)).next().expect("there");
        assert!(first.has_option("noatime") && !first.has_option("noexec"));
        assert!(mounts.at(Path::new("/pods")).is_none());
    }

    #[test]
    fn the_own_table_is_readable() {
        let mounts = Mounts::read().expect("there is a /proc");
        assert!(mounts.at(Path::new("/")).is_some());
    }
}
