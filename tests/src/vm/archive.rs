//! A tree of files as the archive that the kernel unpacks into memory before it starts anything.
//!
//! The format is "newc" of cpio (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst): per file a header of
//! 110 ASCII bytes, the name with its zero, and the content, each padded to 4 bytes.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

/// What stands under a name.
#[derive(Clone, Debug)]
pub(super) enum Node {
    Directory,
    /// An executable file, copied from the host.
    File(PathBuf),
    Link(String),
    /// The console, which must exist before anything can make it.
    Console,
}

/// A tree to be. Names are absolute without the first slash.
#[derive(Clone, Debug, Default)]
pub(super) struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// Puts `node` at `name`, with the directories above it.
    pub(super) fn put(&mut self, name: &str, node: Node) {
        let name = name.trim_start_matches('/');
        for (at, _) in name.match_indices('/') {
            let above = self
                .nodes
                .entry(name[..at].to_owned())
                .or_insert(Node::Directory);
            assert!(
                matches!(above, Node::Directory),
                "{name}: {} is no directory",
                &name[..at]
            );
        }
        self.nodes.insert(name.to_owned(), node);
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.nodes.contains_key(name.trim_start_matches('/'))
    }

    /// Writes the archive. A directory comes before what is in it, because its name sorts first.
    pub(super) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for (at, (name, node)) in self.nodes.iter().enumerate() {
            let inode = at as u32 + 1;
            let content = match node {
                Node::Directory | Node::Console => Vec::new(),
                Node::File(path) => std::fs::read(path)
                    .map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?,
                Node::Link(target) => target.clone().into_bytes(),
            };
            let (mode, device) = match node {
                Node::Directory => (0o040_755, (0, 0)),
                Node::File(_) => (0o100_755, (0, 0)),
                Node::Link(_) => (0o120_777, (0, 0)),
                Node::Console => (0o020_600, (5, 1)),
            };
            entry(out, name, inode, mode, device, &content)?;
        }
        entry(out, "TRAILER!!!", 0, 0, (0, 0), &[])
    }
}

fn entry(
    out: &mut impl Write,
    name: &str,
    inode: u32,
    mode: u32,
    device: (u32, u32),
    content: &[u8],
) -> io::Result<()> {
    let size = u32::try_from(content.len()).map_err(|_| io::Error::other("past 4 GiB"))?;
    let name_size = name.len() as u32 + 1;
    write!(out, "070701")?;
    let links = 1;
    let fields = [
        inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0,
    ];
    for field in fields {
        write!(out, "{field:08X}")?;
    }
    out.write_all(name.as_bytes())?;
    out.write_all(&[0])?;
    pad(out, 110 + name.len() + 1)?;
    out.write_all(content)?;
    pad(out, content.len())
}

fn pad(out: &mut impl Write, written: usize) -> io::Result<()> {
    out.write_all(&[0; 3][..written.next_multiple_of(4) - written])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_parents_first_and_everything_on_four_bytes() {
        let mut tree = Tree::default();
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), b"hello").expect("is written");
        tree.put("/a/b/c", Node::File(file.path().to_owned()));
        tree.put("a/link", Node::Link("b/c".into()));
        tree.put("dev/console", Node::Console);
        assert!(tree.has("/a/b") && !tree.has("/a/x"));
        let mut bytes = Vec::new();
        tree.write(&mut bytes).expect("writes to memory");
        assert!(bytes.len().is_multiple_of(4));
        let mut names = Vec::new();
        let mut at = 0;
        let field = |at: usize, index: usize| {
            let start = at + 6 + index * 8;
            let text = std::str::from_utf8(&bytes[start..start + 8]).expect("ASCII");
            usize::from_str_radix(text, 16).expect("hexadecimal")
        };
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let (size, name_size) = (field(at, 6), field(at, 11));
            let name = &bytes[at + 110..at + 110 + name_size - 1];
            let content = (at + 110 + name_size).next_multiple_of(4);
            names.push(String::from_utf8(name.to_vec()).expect("UTF-8"));
            if name == b"a/b/c" {
                assert_eq!(&bytes[content..content + size], b"hello");
            }
            at = (content + size).next_multiple_of(4);
        }
        let wanted = [
            "a",
            "a/b",
            "a/b/c",
            "a/link",
            "dev",
            "dev/console",
            "TRAILER!!!",
        ];
        assert_eq!(names, wanted);
    }
}
