//! Options for mount(8) that come from a caller, the same for every front end.
//!
//! Some options make the mount another one (`bind`, `loop`), reach another device (an external log or journal, hash trees)
//! or harm the machine (`errors=panic`), and whoever may write a pod may name options. So what is known to do none of that
//! is let through, and nothing else. The lists are of mount(8), ext4(5), xfs(5) and the kernel's parsers of both.
//!
//! Options may be secret: no message repeats one.

use crate::refusal::Refusal;

/// All options of a mount together, with commas between.
const BYTES_MAX: usize = 4096;

/// Options without a value.
const FLAGS: &[&str] = &[
    // Of every file system.
    "async",
    "atime",
    "auto",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "noauto",
    "nodev",
    "nodiratime",
    "noexec",
    "nofail",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "relatime",
    "ro",
    "rw",
    "silent",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "_netdev",
    // ext4.
    "acl",
    "auto_da_alloc",
    "barrier",
    "block_validity",
    "bsddf",
    "bsdgroups",
    "delalloc",
    "dioread_lock",
    "dioread_nolock",
    "discard",
    "grpid",
    "grpquota",
    "i_version",
    "init_itable",
    "inlinecrypt",
    "journal_async_commit",
    "journal_checksum",
    "minixdf",
    "no_mbcache",
    "no_prefetch_block_bitmaps",
    "noacl",
    "noauto_da_alloc",
    "nobarrier",
    "noblock_validity",
    "nodelalloc",
    "nodiscard",
    "nogrpid",
    "noinit_itable",
    "nojournal_checksum",
    "noload",
    "nombcache",
    "noquota",
    "norecovery",
    "nouid32",
    "nouser_xattr",
    "nowarn_on_error",
    "oldalloc",
    "orlov",
    "prefetch_block_bitmaps",
    "prjquota",
    "quota",
    "sysvgroups",
    "user_xattr",
    "usrquota",
    "warn_on_error",
    // xfs.
    "attr2",
    "filestreams",
    "gqnoenforce",
    "gquota",
    "ikeep",
    "inode32",
    "inode64",
    "largeio",
    "lifetime",
    "noalign",
    "noattr2",
    "noikeep",
    "nolargeio",
    "nolifetime",
    "nouuid",
    "pqnoenforce",
    "pquota",
    "qnoenforce",
    "swalloc",
    "uqnoenforce",
    "uquota",
    "wsync",
    // Both, of memory that is a disk.
    "dax",
];

/// Options with a value, which names no file or device.
const WITH_VALUE: &[&str] = &[
    // ext4.
    "auto_da_alloc",
    "barrier",
    "commit",
    "data",
    "data_err",
    "init_itable",
    "inode_readahead_blks",
    "journal_ioprio",
    "jqfmt",
    "max_batch_time",
    "max_dir_size_kb",
    "mb_optimize_scan",
    "min_batch_time",
    "resgid",
    "resuid",
    "stripe",
    // xfs.
    "allocsize",
    "logbsize",
    "logbufs",
    "max_atomic_write",
    "max_open_zones",
    "sunit",
    "swidth",
    // Both.
    "dax",
];

/// Labels of SELinux, which a kubelet adds. Their values may stand in quotes, with commas inside.
const LABELS: &[&str] = &["context", "defcontext", "fscontext", "rootcontext"];

/// What the kernel does with a file system that turns out to be damaged; never to the whole machine.
const ON_ERRORS: &[&str] = &["continue", "remount-ro"];

/// Checks options, of which each may be several with commas between.
pub fn check(options: &[String]) -> Result<(), Refusal> {
    let bytes: usize = options.iter().map(|option| option.len() + 1).sum();
    if bytes > BYTES_MAX {
        return Err(Refusal::invalid(format!(
            "the mount options are longer than {BYTES_MAX} bytes"
        )));
    }
    for (at, option) in options.iter().enumerate() {
        if !parts(option).is_some_and(|parts| parts.into_iter().all(is_allowed)) {
            return Err(Refusal::invalid(format!(
                "mount option {} of {} is none that may be given for a volume: those of ext4(5) and xfs(5) and the general \
                 ones of mount(8) may, but for what names another device, file or place, or would stop the machine",
                at + 1,
                options.len()
            )));
        }
    }
    Ok(())
}

/// The options of a list with commas between, without the empty ones.
pub fn split(list: &str) -> Vec<String> {
    match parts(list) {
        Some(parts) => parts
            .into_iter()
            .filter(|part| !part.is_empty())
            .map(str::to_owned)
            .collect(),
        // For the check to refuse.
        None => vec![list.to_owned()],
    }
}

/// Whether the options ask for a mount that cannot be written: of `ro` and `rw` the last one counts.
pub fn is_read_only(options: &[String]) -> bool {
    options
        .iter()
        .filter_map(|option| parts(option))
        .flatten()
        .fold(false, |read_only, part| match part {
            "ro" => true,
            "rw" => false,
            _ => read_only,
        })
}

/// The options of one string: at commas that are not in quotes. `None` when a quote has no end.
fn parts(option: &str) -> Option<Vec<&str>> {
    let mut parts = Vec::new();
    let (mut begin, mut is_quoted) = (0, false);
    for (at, byte) in option.bytes().enumerate() {
        match byte {
            b'"' => is_quoted = !is_quoted,
            b',' if !is_quoted => {
                parts.push(&option[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&option[begin..]);
    (!is_quoted).then_some(parts)
}

fn is_allowed(part: &str) -> bool {
    let Some((name, value)) = part.split_once('=') else {
        return FLAGS.contains(&part);
    };
    if name == "errors" {
        return ON_ERRORS.contains(&value);
    }
    let is_word = |value: &str, more: &[u8]| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || more.contains(&byte);
        !value.is_empty() && value.bytes().all(allowed)
    };
    if LABELS.contains(&name) {
        return match value.strip_prefix('"') {
            // The kernel takes the quotes of these, and of no others, for quotes.
            Some(rest) => rest
                .strip_suffix('"')
                .is_some_and(|label| is_word(label, b"_:.,-")),
            None => is_word(value, b"_:.-"),
        };
    }
    WITH_VALUE.contains(&name) && is_word(value, b"_-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refusal::Class;

    fn options(given: &[&str]) -> Vec<String> {
        given.iter().map(|each| (*each).to_owned()).collect()
    }

    #[test]
    fn what_shapes_the_mount_of_the_volume_itself_is_let_through() {
        for good in [
            &[][..],
            &["noatime"],
            &["noatime,nodiratime", "ro"],
            &["discard", "commit=30", "data=ordered", "errors=remount-ro"],
            &["nouuid", "logbufs=8", "logbsize=256k", "allocsize=64m"],
            &["usrquota,prjquota", "stripe=16", "_netdev"],
            &["context=system_u:object_r:container_file_t:s0"],
            &[
                "noatime",
                "context=\"system_u:object_r:container_file_t:s0:c10,c20\"",
            ],
        ] {
            assert_eq!(check(&options(good)), Ok(()), "{good:?}");
        }
    }

    #[test]
    fn hostile_options_are_refused_and_never_repeated() {
        let long = "noatime,".repeat(600);
        let hostile = [
            "logdev=/dev/sda",
            "rtdev=/dev/sda",
            "journal_path=/dev/sda",
            "journal_dev=2049",
            "noatime,logdev=/dev/sda",
            "logdev = /dev/sda",
            " logdev=/dev/sda",
            "LOGDEV=/dev/sda",
            "bind",
            "rbind",
            "noatime,bind",
            "move",
            "remount",
            "ro,remount",
            "loop",
            "loop=/dev/loop7",
            "offset=4096",
            "sizelimit=1",
            "helper=evil",
            "uhelper=evil",
            "X-mount.mkdir",
            "x-mount.mkdir=0777",
            "X-mount.subdir=../etc",
            "X-mount.idmap=/proc/1/ns/user",
            "verity.hashdevice=/dev/sda",
            "encryption=aes",
            "shared",
            "rshared",
            "make-rshared",
            "private",
            "user",
            "users",
            "owner",
            "group",
            "uid=0",
            "umask=0",
            "fd=3",
            "rootmode=40000",
            "lowerdir=/etc",
            "upperdir=/etc",
            "usrjquota=aquota.user",
            "usrjquota=../x",
            "sb=131072",
            "errors=panic",
            "errors=continue,errors=panic",
            "errors",
            "abort",
            "test_dummy_encryption",
            "data=/dev/sda",
            "commit=",
            "commit=5,",
            "",
            ",",
            "noatime,,ro",
            "no\natime",
            "a\0b",
            "noatime\\,bind",
            // What mount(8) takes for one quoted option and the kernel for two.
            "commit=\"5,logdev=/dev/sda\"",
            "context=\"a,logdev=/dev/sda\"",
            "context=\"a",
            "context=a\"",
            "context=\"a\"b",
            "context=\"\"",
            "\"bind\"",
            "context=\"a,bind=\"",
            "context=a,bind",
            "comment=x",
            "unknown",
            "=",
            "=x",
            long.as_str(),
        ];
        for hostile in hostile {
            for given in [&[hostile][..], &["noatime", hostile, "nodev"]] {
                let refused = check(&options(given)).expect_err(hostile);
                assert_eq!(refused.class, Class::InvalidArgument, "{hostile}");
                assert!(
                    hostile.len() < 5 || !refused.message.contains(hostile),
                    "{hostile} is repeated"
                );
            }
        }
        // Two strings of which each is half.
        assert!(check(&options(&["context=\"a", "b\""])).is_err());
    }

    #[test]
    fn the_last_of_ro_and_rw_counts() {
        for (given, wanted) in [
            (&[][..], false),
            (&["noatime"], false),
            (&["ro"], true),
            (&["noatime,ro", "nodev"], true),
            (&["ro", "rw"], false),
            (&["rw,ro"], true),
            (&["context=\"ro,ro\""], false),
        ] {
            assert_eq!(is_read_only(&options(given)), wanted, "{given:?}");
        }
    }
}
