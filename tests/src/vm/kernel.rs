//! The kernel that virtual machines boot: a Debian package, unpacked and never installed (scripts/setup.sh does that).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::archive::{Node, Tree};
use crate::suites;
use crate::tool::Tool;

/// What a machine may load. What these need comes along.
const MODULES: [&str; 12] = [
    "nbd",
    "xfs",
    "dm_crypt",
    "loop",
    "fuse",
    "overlay",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "crc32c_intel",
    "crct10dif_pclmul",
];

/// An unpacked kernel package.
pub(super) struct Kernel {
    root: PathBuf,
    version: String,
}

impl Kernel {
    /// The one `ASHLAR_TESTS_VM_KERNEL` names (a directory with `boot/vmlinuz-VERSION` and `lib/modules/VERSION`), else the
    /// one the set-up unpacked.
    pub(super) fn find() -> Kernel {
        let root = std::env::var_os("ASHLAR_TESTS_VM_KERNEL")
            .map_or_else(|| suites::cache().join("vm-kernel"), PathBuf::from);
        let version = std::fs::read_dir(root.join("lib/modules"))
            .ok()
            .and_then(|mut entries| entries.next()?.ok())
            .and_then(|entry| entry.file_name().into_string().ok());
        let Some(version) = version else {
            panic!(
                "no kernel for virtual machines in {} (`scripts/setup.sh test` brings one; ASHLAR_TESTS_VM_KERNEL names another)",
                root.display()
            );
        };
        Kernel { root, version }
    }

    pub(super) fn image(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.version))
    }

    /// Puts the modules and the index that modprobe reads into `tree`. `scratch` is an empty directory.
    pub(super) fn put_modules(&self, tree: &mut Tree, scratch: &Path) {
        let folder = format!("lib/modules/{}", self.version);
        let from = self.root.join(&folder);
        let copy = scratch.join(&folder);
        std::fs::create_dir_all(&copy).expect("a directory in the scratch directory");
        let text = std::fs::read_to_string(from.join("modules.dep"))
            .expect("modules.dep, which the set-up makes with depmod");
        for module in closure(&text, &MODULES) {
            let to = copy.join(&module);
            std::fs::create_dir_all(to.parent().expect("inside"))
                .expect("a directory in the scratch directory");
            std::fs::copy(from.join(&module), &to)
                .unwrap_or_else(|error| panic!("{module}: {error}"));
            tree.put(&format!("usr/{folder}/{module}"), Node::File(to));
        }
        for list in [
            "modules.builtin",
            "modules.builtin.modinfo",
            "modules.order",
        ] {
            std::fs::copy(from.join(list), copy.join(list))
                .unwrap_or_else(|error| panic!("{list}: {error}"));
        }
        // The index of the part that is there, so that modprobe finds nothing that is not.
        Tool::new("depmod")
            .arg("-b")
            .arg(scratch)
            .arg(&self.version)
            .succeed();
        for entry in std::fs::read_dir(&copy).expect("the copy is readable") {
            let entry = entry.expect("a readable entry");
            if entry.file_type().expect("a file type").is_file() {
                let name = entry.file_name().into_string().expect("a UTF-8 name");
                tree.put(&format!("usr/{folder}/{name}"), Node::File(entry.path()));
            }
        }
    }
}

/// Paths of `wanted` and of what they need, from the text of a modules.dep (`PATH: PATH...`). A module that is not listed is
/// built into the kernel or absent; which of the two shows when it is used.
fn closure(text: &str, wanted: &[&str]) -> BTreeSet<String> {
    let name = |path: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split('.').next().unwrap_or(file).replace('-', "_")
    };
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(path, _)| wanted.contains(&name(path).as_str()))
        .flat_map(|(path, needs)| std::iter::once(path).chain(needs.split_whitespace()))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::closure;

    #[test]
    fn modules_bring_what_they_need() {
        let text = "kernel/a/dm-crypt.ko: kernel/b/dm-mod.ko kernel/c.ko\nkernel/b/dm-mod.ko:\nkernel/c.ko:\nkernel/d.ko.xz:\n";
        let found: Vec<String> = closure(text, &["dm_crypt"]).into_iter().collect();
        let wanted = ["kernel/a/dm-crypt.ko", "kernel/b/dm-mod.ko", "kernel/c.ko"];
        assert_eq!(found, wanted);
        assert_eq!(closure(text, &["d"]).len(), 1);
    }
}
