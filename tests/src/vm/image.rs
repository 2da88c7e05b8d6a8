//! What a virtual machine finds when it starts: our programs, the host's own tools with their libraries, and kernel modules,
//! all in memory. Everything comes from the host that runs the tests, so that what is tested is what is installed there.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use super::archive::{Node, Tree};
use super::kernel::Kernel;
use crate::daemon::binary;
use crate::suites;
use crate::tool::Tool;

/// Programs of the host that go in. `scripts/setup.sh` installs what brings them.
const TOOLS: [&str; 73] = [
    // A shell and what scripts are made of.
    "bash",
    "basename",
    "cat",
    "chmod",
    "cmp",
    "cp",
    "cut",
    "date",
    "dd",
    "df",
    "dirname",
    "du",
    "echo",
    "env",
    "expr",
    "false",
    "find",
    "grep",
    "head",
    "id",
    "kill",
    "ln",
    "ls",
    "mkdir",
    "mknod",
    "mv",
    "od",
    "ps",
    "pgrep",
    "readlink",
    "rm",
    "rmdir",
    "sed",
    "seq",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "sync",
    "tail",
    "tee",
    "test",
    "timeout",
    "touch",
    "tr",
    "true",
    "truncate",
    "uname",
    "wc",
    "xargs",
    // Block devices and file systems.
    "blkdiscard",
    "blkid",
    "blockdev",
    "dmesg",
    "findmnt",
    "fsck",
    "fsfreeze",
    "fstrim",
    "losetup",
    "lsblk",
    "mount",
    "umount",
    "wipefs",
    "debugfs",
    "dumpe2fs",
    "dumpe2fs",
    "e2fsck",
    "mke2fs",
    "resize2fs",
    "tune2fs",
    // Modules and NBD.
    "kmod",
    "nbd-client",
    "nbdinfo",
];

/// As TOOLS, of xfsprogs; some of them are shell scripts around others.
const XFS_TOOLS: [&str; 6] = [
    "mkfs.xfs",
    "xfs_admin",
    "xfs_db",
    "xfs_growfs",
    "xfs_io",
    "xfs_repair",
];

/// Other names of programs above.
const NAMES: [(&str, &str); 7] = [
    ("sbin/mkfs.ext4", "mke2fs"),
    ("sbin/fsck.ext4", "e2fsck"),
    ("sbin/fsck.xfs", "true"),
    ("sbin/modprobe", "kmod"),
    ("sbin/rmmod", "kmod"),
    ("bin/lsmod", "kmod"),
    ("bin/sh", "bash"),
];

/// Files that the tools read.
const SETTINGS: [&str; 1] = ["/etc/mke2fs.conf"];

/// Where the host's programs are looked for.
const FOLDERS: [&str; 6] = [
    "/usr/bin",
    "/usr/sbin",
    "/bin",
    "/sbin",
    "/usr/local/bin",
    "/usr/local/sbin",
];

/// An archive on the disk, removed with its last user.
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    pub(super) archive: PathBuf,
    _scratch: tempfile::TempDir,
}

impl Image {
    /// The image of this run; it is made once and shared by all machines.
    pub(super) fn shared() -> Arc<Image> {
        static MADE: Mutex<Weak<Image>> = Mutex::new(Weak::new());
        let mut made = MADE.lock().unwrap_or_else(|poison| poison.into_inner());
        made.upgrade().unwrap_or_else(|| {
            let image = Arc::new(Image::make());
            *made = Arc::downgrade(&image);
            image
        })
    }

    fn make() -> Image {
        let scratch = tempfile::Builder::new()
            .prefix("ashlar-vm-image-")
            .tempdir_in("/var/tmp")
            .expect("a scratch directory");
        let kernel = Kernel::find();
        let mut tree = Tree::default();
        for folder in [
            "dev", "etc", "mnt", "proc", "run", "sys", "tmp", "usr/bin", "usr/sbin", "var/log",
            "var/tmp",
        ] {
            tree.put(folder, Node::Directory);
        }
        for (name, target) in [
            ("bin", "usr/bin"),
            ("sbin", "usr/sbin"),
            ("lib", "usr/lib"),
            ("lib64", "usr/lib64"),
            ("var/run", "../run"),
            ("etc/mtab", "../proc/self/mounts"),
        ] {
            tree.put(name, Node::Link(target.to_owned()));
        }
        tree.put("dev/console", Node::Console);
        kernel.put_modules(&mut tree, scratch.path());
        for name in TOOLS.iter().chain(&XFS_TOOLS) {
            put_program(&mut tree, &find(name), name);
        }
        for (name, target) in NAMES {
            let there = find(target);
            tree.put(&format!("usr/{name}"), Node::Link(in_the_tree(&there)));
        }
        for file in SETTINGS {
            tree.put(file, Node::File(file.into()));
        }
        put_program(&mut tree, &suites::csi_sanity(), "csi-sanity");
        for (name, path) in ours() {
            let small = scratch.path().join(name);
            Tool::new("strip")
                .arg("-o")
                .arg(&small)
                .arg(&path)
                .succeed();
            put_program(&mut tree, &path, name);
            tree.put(&format!("usr/bin/{name}"), Node::File(small));
        }
        tree.put("init", Node::Link("usr/bin/vm-guest".to_owned()));
        let archive = scratch.path().join("initramfs.cpio");
        let mut out = BufWriter::new(File::create(&archive).expect("the archive can be created"));
        tree.write(&mut out)
            .and_then(|()| out.flush())
            .expect("the archive can be written");
        Image {
            kernel: kernel.image(),
            archive,
            _scratch: scratch,
        }
    }
}

/// Our own programs by their names in the machine.
fn ours() -> Vec<(&'static str, PathBuf)> {
    vec![
        ("ashlard", binary("ashlard")),
        ("ashlar", binary("ashlar")),
        ("ashlar-csi", binary("ashlar-csi")),
        // Cargo builds it before the tests that use it, into the directory above theirs.
        ("vm-guest", super::target().join("release/vm-guest")),
    ]
}

fn find(name: &str) -> PathBuf {
    FOLDERS
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.exists())
        .unwrap_or_else(|| {
            panic!("{name} is not installed (`scripts/setup.sh test` installs what the tests need)")
        })
}

/// The path of a host's program in the machine, where everything lies below /usr.
fn in_the_tree(path: &Path) -> String {
    let text = path.to_str().expect("a UTF-8 path");
    if text.starts_with("/usr/") {
        text.to_owned()
    } else {
        format!("/usr{text}")
    }
}

/// Puts a program at its place, with the libraries it is linked to.
fn put_program(tree: &mut Tree, path: &Path, name: &str) {
    let own = name_in_tree(path, name);
    tree.put(&own, Node::File(path.to_owned()));
    let listed = Tool::new("ldd").arg(path).run();
    for library in libraries(&listed.stdout) {
        let place = in_the_tree(Path::new(&library));
        if !tree.has(&place) {
            tree.put(&place, Node::File(library.into()));
        }
    }
}

fn name_in_tree(path: &Path, name: &str) -> String {
    if path.starts_with("/usr") || path.starts_with("/bin") || path.starts_with("/sbin") {
        in_the_tree(path)
    } else {
        format!("usr/bin/{name}")
    }
}

/// The paths in what ldd prints; nothing for a program without libraries.
fn libraries(listed: &str) -> Vec<String> {
    listed
        .lines()
        .filter_map(|line| {
            let line = line.split(" (0x").next()?.trim();
            let path = line.split_once("=>").map_or(line, |(_, path)| path.trim());
            path.starts_with('/').then(|| path.to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let listed = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibnl-3.so.200 => /lib/x86_64-linux-gnu/libnl-3.so.200 (0x00007f)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            libraries(listed),
            [
                "/lib/x86_64-linux-gnu/libnl-3.so.200",
                "/lib64/ld-linux-x86-64.so.2"
            ]
        );
        assert!(libraries("\tnot a dynamic executable\n").is_empty());
        assert_eq!(in_the_tree(Path::new("/sbin/mke2fs")), "/usr/sbin/mke2fs");
    }
}
