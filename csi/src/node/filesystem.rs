//! Making, checking, mounting and growing filesystems: the system's own programs, each with a deadline.

use std::path::Path;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use uuid::Uuid;

use super::format::Found;
use super::given_up;
use crate::capability::Filesystem;
use crate::child::{Child, ChildError, Finished};
use crate::mount_options;
use crate::mountinfo::Mounts;
use crate::refusal::{Class, Refusal};

/// Reading a few blocks. Longer than a request may be parked while a server restarts.
pub(super) const PROBE_LIMIT: Duration = Duration::from_secs(45);
/// Making a filesystem writes megabytes, not gigabytes.
const MAKE_LIMIT: Duration = Duration::from_secs(300);
/// How long a check may stand still. It may read every inode, which takes as long as it takes: one that was killed for that
/// would begin from the start the next time, and never end. Longer than a server takes to come back.
const CHECK_STILL_LIMIT: Duration = Duration::from_secs(600);
/// Mounting replays a log of at most some hundred megabytes.
const MOUNT_LIMIT: Duration = Duration::from_secs(120);
/// Growing writes new group descriptors.
const GROW_LIMIT: Duration = Duration::from_secs(600);

impl From<ChildError> for Refusal {
    fn from(error: ChildError) -> Refusal {
        let class = match &error {
            ChildError::TimedOut { .. } => Class::DeadlineExceeded,
            ChildError::Start { .. } | ChildError::Output { .. } => Class::Internal,
        };
        Refusal::new(class, error.to_string())
    }
}

fn demand(finished: Finished) -> Result<Finished, Refusal> {
    if finished.succeeded() {
        Ok(finished)
    } else {
        Err(Refusal::internal(finished.to_string()))
    }
}

/// What is on a device. Whether the places where a signature would be can be *read* is found out first and separately,
/// because blkid does not tell the difference.
pub async fn look(device: &Path, size_bytes: u64) -> Result<Found, Refusal> {
    if let Err(why) = is_readable(device, size_bytes).await? {
        return Ok(Found::Unreadable(why));
    }
    let finished = Child::new("blkid")
        .args(["--probe", "--output", "export"])
        .arg(device)
        .run(PROBE_LIMIT)
        .await?;
    match finished.code {
        0 => Ok(signature(&finished.stdout)),
        2 => Ok(Found::Nothing),
        8 => Ok(Found::Unreadable(
            "signatures of more than one kind".to_owned(),
        )),
        _ => Ok(Found::Unreadable(finished.to_string())),
    }
}

/// What is on a device that has no signature and should never have been written to: its beginning and its end have to be
/// zeros. Bytes there are another device's, of somebody who needs no file system.
pub async fn look_closer(device: &Path, size_bytes: u64) -> Result<Found, Refusal> {
    const PIECE: u64 = 1 << 20;
    let piece = size_bytes.min(PIECE);
    for skip in [0, size_bytes - piece] {
        let finished = Child::new("cmp")
            .arg(format!("--bytes={piece}"))
            .arg(format!("--ignore-initial={skip}:0"))
            .arg(device)
            .arg("/dev/zero")
            .run(PROBE_LIMIT)
            .await?;
        match finished.code {
            0 => {}
            1 => {
                return Ok(Found::Signature {
                    kind: "data without a signature".to_owned(),
                    uuid: String::new(),
                });
            }
            _ => return Ok(Found::Unreadable(finished.to_string())),
        }
    }
    Ok(Found::Nothing)
}

/// What is found, after a look inside where it is the filesystem that was begun with this UUID: one that says itself that it
/// was never finished is told from one that somebody may have used.
pub async fn look_inside(device: &Path, found: Found, begun: Uuid) -> Result<Found, Refusal> {
    let Found::Signature { kind, uuid } = &found else {
        return Ok(found);
    };
    let (Ok(filesystem), Ok(own)) = (kind.parse::<Filesystem>(), uuid.parse::<Uuid>()) else {
        return Ok(found);
    };
    if own != begun {
        return Ok(found);
    }
    let unfinished = || Found::Unfinished {
        kind: kind.clone(),
        uuid: uuid.clone(),
    };
    let unreadable = |finished: &Finished| Ok(Found::Unreadable(finished.to_string()));
    match filesystem {
        Filesystem::Ext4 => {
            let told = superblock_of_ext4(device).await?;
            // It tells what it can read also where it complains of the rest.
            match last_mount(&told.stdout) {
                None => return unreadable(&told),
                Some("n/a") => {}
                Some(_) => return Ok(found),
            }
            let checked = Child::new("e2fsck").args(["-f", "-n"]).arg(device);
            let checked = checked.run(MAKE_LIMIT).await?;
            match checked.code {
                0 => Ok(found),
                // e2fsck(8): errors that were left, be it that it gave up on them.
                4 | 12 => Ok(unfinished()),
                _ => unreadable(&checked),
            }
        }
        Filesystem::Xfs => {
            // mkfs.xfs takes the mark away last, and the kernel mounts none that has it.
            let child = Child::new("xfs_db").args(["-r", "-c", "sb 0", "-c", "print inprogress"]);
            let told = child.arg(device).run(PROBE_LIMIT).await?;
            match told.stdout.trim() {
                "inprogress = 0" => Ok(found),
                "inprogress = 1" => Ok(unfinished()),
                _ => unreadable(&told),
            }
        }
    }
}

/// What dumpe2fs tells of the superblock of an ext4.
async fn superblock_of_ext4(device: &Path) -> Result<Finished, ChildError> {
    let child = Child::new("dumpe2fs").arg("-h").arg(device);
    child.run(PROBE_LIMIT).await
}

/// Whether an ext4 has errors on record, in the words of dumpe2fs.
fn has_errors(told: &str) -> bool {
    told.lines().any(|line| line.starts_with("FS Error count:"))
}

/// When an ext4 was last mounted for writing, in the words of dumpe2fs: `n/a` is never.
fn last_mount(told: &str) -> Option<&str> {
    let mut lines = told.lines();
    lines.find_map(|line| line.strip_prefix("Last mount time:").map(str::trim))
}

/// blkid's `NAME=value` lines.
fn signature(text: &str) -> Found {
    let value = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .unwrap_or_default()
            .to_owned()
    };
    let kind = match value("TYPE") {
        // A partition table has no type of its own.
        kind if kind.is_empty() => match value("PTTYPE") {
            table if table.is_empty() => "something without a name".to_owned(),
            table => format!("a partition table ({table})"),
        },
        kind => kind,
    };
    Found::Signature {
        kind,
        uuid: value("UUID"),
    }
}

/// Reads the first megabyte and the last block, past the page cache.
async fn is_readable(device: &Path, size_bytes: u64) -> Result<Result<(), String>, Refusal> {
    const BLOCK: u64 = 4096;
    let blocks = size_bytes / BLOCK;
    for (skip, count) in [(0, blocks.min(256)), (blocks.saturating_sub(1), 1)] {
        let finished = Child::new("dd")
            .arg(format!("if={}", device.display()))
            .args([
                "of=/dev/null",
                "bs=4096",
                "iflag=direct,fullblock",
                "status=noxfer",
            ])
            .arg(format!("skip={skip}"))
            .arg(format!("count={count}"))
            .run(PROBE_LIMIT)
            .await?;
        if !finished.succeeded() {
            return Ok(Err(finished.to_string()));
        }
        // "256+0 records in": a device that is shorter than it says reads less without an error.
        if !finished.stderr.contains(&format!("{count}+0 records in")) {
            return Ok(Err(format!("it ends before its size: {finished}")));
        }
    }
    Ok(Ok(()))
}

/// Whether a device answers at all.
pub async fn answers(device: &Path) -> bool {
    matches!(is_readable(device, 4096).await, Ok(Ok(())))
}

/// Whether a device answers with an error. One that does not answer is another matter.
pub async fn fails(device: &Path) -> bool {
    matches!(is_readable(device, 4096).await, Ok(Err(_)))
}

/// Waits until nobody has a device for himself any more. An unmount ends before the filesystem does: that keeps the device
/// until the last of its blocks is written.
pub async fn released(device: &Path, limit: Duration) -> Result<(), Refusal> {
    const LOOK_AGAIN: Duration = Duration::from_millis(200);
    let looking = async {
        loop {
            let node = device.to_owned();
            let opened = tokio::task::spawn_blocking(move || {
                let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
                rustix::fs::open(node, flags, Mode::empty()).map(drop)
            });
            match opened.await {
                Ok(Err(Errno::BUSY)) => tokio::time::sleep(LOOK_AGAIN).await,
                // Anything else is for who uses the device next.
                _ => return,
            }
        }
    };
    tokio::time::timeout(limit, looking).await.map_err(|_| {
        Refusal::new(
            Class::DeadlineExceeded,
            format!(
                "{} is still being written to, or somebody has it open for himself",
                device.display()
            ),
        )
    })
}

/// Makes a filesystem with this UUID. Never forces, though only mkfs.xfs then refuses where it finds something: mkfs.ext4
/// asks a person, and goes on where there is none. What protects data is the decision before ([`super::format`]).
/// `blank`: nothing was ever written to the device, so that zeros need not be.
pub async fn make(
    filesystem: Filesystem,
    uuid: Uuid,
    options: &[String],
    device: &Path,
    blank: bool,
) -> Result<(), Refusal> {
    let child = match filesystem {
        // No blocks kept back for root: a volume is for its user.
        Filesystem::Ext4 => {
            let child = Child::new("mkfs.ext4").args(["-q", "-m", "0", "-U"]);
            let child = child.arg(uuid.to_string());
            if blank && mkfs_ext4_takes_blank_devices().await? {
                child.args(["-E", BLANK])
            } else {
                child
            }
        }
        Filesystem::Xfs => Child::new("mkfs.xfs")
            .args(["-q", "-m"])
            .arg(format!("uuid={uuid}")),
    };
    demand(child.args(options).arg(device).run(MAKE_LIMIT).await?)?;
    flush(device).await
}

/// Tells mkfs.ext4 that the device reads as zeros. Without it mkfs writes zeros over the journal, and the kernel, once it is
/// mounted, over the inode tables, a 64th of the volume. A driver that knows no write-zeroes, as Linux 6.1's, sends them all,
/// and every copy keeps them.
const BLANK: &str = "assume_storage_prezeroed=1";
/// The first e2fsprogs whose mkfs knows [`BLANK`].
const BLANK_SINCE: (u32, u32) = (1, 47);

async fn mkfs_ext4_takes_blank_devices() -> Result<bool, Refusal> {
    let finished = Child::new("mkfs.ext4").arg("-V").run(PROBE_LIMIT).await?;
    Ok(version_of_mke2fs(&finished.stderr).is_some_and(|version| version >= BLANK_SINCE))
}

/// The version in what `mke2fs -V` says: `mke2fs 1.47.0 (5-Feb-2023)`.
fn version_of_mke2fs(said: &str) -> Option<(u32, u32)> {
    let numbers = said.trim_start().strip_prefix("mke2fs ")?;
    let mut numbers = numbers.split(|char: char| !char.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

/// Everything written to the device is durable when this returns.
async fn flush(device: &Path) -> Result<(), Refusal> {
    let finished = Child::new("sync").arg(device).run(MAKE_LIMIT).await?;
    demand(finished).map(drop)
}

/// Makes every block of a device read as zeros. For what a mkfs that did not finish left, and nothing else.
pub async fn discard(device: &Path) -> Result<(), Refusal> {
    let finished = Child::new("blkdiscard").arg(device).run(MAKE_LIMIT).await?;
    demand(finished).map(drop)
}

/// Checks an ext4 and repairs what can be repaired without losing anything, as after a power cut. An xfs checks itself
/// when it is mounted.
pub async fn check(filesystem: Filesystem, device: &Path) -> Result<(), Refusal> {
    if filesystem == Filesystem::Xfs {
        return Ok(());
    }
    // One that is marked clean is looked at closely only where errors are on record, and rid of the record then.
    let has_errors = has_errors(&superblock_of_ext4(device).await?.stdout);
    let finished = Child::new("e2fsck")
        .arg(if has_errors { "-fp" } else { "-p" })
        .arg(device)
        .run_while_busy(CHECK_STILL_LIMIT)
        .await?;
    // e2fsck(8): 1 is repaired, 2 asks for a restart when the filesystem was mounted, which it is not.
    if finished.code <= 2 {
        return Ok(());
    }
    Err(Refusal::internal(format!(
        "the filesystem on {} needs a person: run e2fsck by hand. {finished}",
        device.display()
    )))
}

/// Mounts a device at a directory: read-only where that is asked for, be it by the options. An ext4 gives up on the first
/// error, unless the options say what it does.
pub async fn mount(
    filesystem: Filesystem,
    device: &Path,
    point: &Path,
    options: &[String],
    read_only: bool,
) -> Result<(), Refusal> {
    let read_only = read_only || mount_options::is_read_only(options);
    // Of two that contradict each other the last one counts.
    let mut all = match filesystem {
        Filesystem::Ext4 => vec![given_up::ON_ERROR],
        Filesystem::Xfs => Vec::new(),
    };
    all.extend(options.iter().map(String::as_str));
    all.push(if read_only { "ro" } else { "rw" });
    let finished = Child::new("mount")
        .args(["-t", filesystem.name(), "-o"])
        .secret_arg(all.join(","))
        .arg(device)
        .arg(point)
        .run(MOUNT_LIMIT)
        .await?;
    if finished.succeeded() {
        return Ok(());
    }
    let hint = match filesystem {
        Filesystem::Ext4 => "if the filesystem is damaged, run e2fsck by hand",
        Filesystem::Xfs => "if the filesystem is damaged, run xfs_repair by hand",
    };
    Err(Refusal::internal(format!("{finished} ({hint})")))
}

/// Marks a device read-only, or writable.
pub async fn set_read_only(device: &Path, read_only: bool) -> Result<(), Refusal> {
    let mark = if read_only { "--setro" } else { "--setrw" };
    let child = Child::new("blockdev").arg(mark).arg(device);
    demand(child.run(PROBE_LIMIT).await?).map(drop)
}

/// Unmounts everything at `point`, one on top of the other. What is not mounted is fine. A point in use is tried again for a
/// moment: what looks at all mounts of a machine, for its metrics, holds each for a little.
pub async fn unmount(point: &Path, limit: Duration) -> Result<(), Refusal> {
    unmount_within(point, limit, Duration::from_secs(1)).await
}

/// As [`unmount`], for a point whose users are about to go: what they waited for has just ended with an error.
pub async fn unmount_once_free(point: &Path, limit: Duration) -> Result<(), Refusal> {
    unmount_within(point, limit, limit).await
}

async fn unmount_within(point: &Path, limit: Duration, patience: Duration) -> Result<(), Refusal> {
    const RETRY: Duration = Duration::from_millis(100);
    let begun = tokio::time::Instant::now();
    loop {
        let before = mounts()?.depth(point);
        if before == 0 {
            return Ok(());
        }
        let finished = Child::new("umount").arg(point).run(limit).await?;
        let after = mounts()?.depth(point);
        if !finished.succeeded() && after >= before {
            if begun.elapsed() >= patience {
                return Err(Refusal::internal(finished.to_string()));
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// What is mounted now.
pub fn mounts() -> Result<Mounts, Refusal> {
    Mounts::read()
        .map_err(|error| Refusal::internal(format!("/proc/self/mountinfo cannot be read: {error}")))
}

/// Makes a mounted filesystem as large as its device; one that is, stays as it is.
pub async fn grow(filesystem: Filesystem, device: &Path, point: &Path) -> Result<(), Refusal> {
    let child = match filesystem {
        Filesystem::Ext4 => Child::new("resize2fs").arg(device),
        Filesystem::Xfs => Child::new("xfs_growfs").arg("-d").arg(point),
    };
    demand(child.run(GROW_LIMIT).await?).map(drop)
}

/// Makes an ext4 that is not mounted as large as its device. Wants a full check before, which may take long.
pub async fn check_and_grow(device: &Path) -> Result<(), Refusal> {
    let child = Child::new("e2fsck").args(["-f", "-p"]).arg(device);
    let finished = child.run_while_busy(CHECK_STILL_LIMIT).await?;
    if finished.code > 2 {
        return Err(Refusal::internal(finished.to_string()));
    }
    let child = Child::new("resize2fs").arg(device);
    demand(child.run(GROW_LIMIT).await?).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_blkid_prints_is_read() {
        let ext4 = "DEVNAME=/dev/loop0\nUUID=0e1d\nBLOCK_SIZE=4096\nTYPE=ext4\nUSAGE=filesystem\n";
        let found = |kind: &str, uuid: &str| Found::Signature {
            kind: kind.into(),
            uuid: uuid.into(),
        };
        assert_eq!(signature(ext4), found("ext4", "0e1d"));
        assert_eq!(
            signature("DEVNAME=/dev/sda\nPTUUID=1\nPTTYPE=gpt\n"),
            found("a partition table (gpt)", "")
        );
        assert_eq!(signature(""), found("something without a name", ""));
    }

    #[test]
    fn the_version_of_mkfs_is_read() {
        let said = "mke2fs 1.47.0 (5-Feb-2023)\n\tUsing EXT2FS Library version 1.47.0\n";
        assert_eq!(version_of_mke2fs(said), Some((1, 47)));
        assert_eq!(version_of_mke2fs("mke2fs 1.46.5"), Some((1, 46)));
        assert_eq!(version_of_mke2fs("mke2fs 2.1-WIP"), Some((2, 1)));
        for other in ["", "mke2fs", "mke2fs one", "mke2fs 1", "mkfs.ext4 1.47.0"] {
            assert_eq!(version_of_mke2fs(other), None, "{other}");
        }
    }

    #[tokio::test]
    async fn blank_short_missing_and_formatted_are_told_apart() {
        let scratch = tempfile::tempdir().expect("a directory");
        let image = scratch.path().join("image");
        let file = std::fs::File::create_new(&image).expect("made");
        file.set_len(16 << 20).expect("sized");
        assert_eq!(look(&image, 16 << 20).await, Ok(Found::Nothing));
        assert_eq!(look_closer(&image, 16 << 20).await, Ok(Found::Nothing));
        for at in [0, (1 << 20) - 1, (16 << 20) - 1] {
            let byte = |byte: u8| std::os::unix::fs::FileExt::write_all_at(&file, &[byte], at);
            byte(1).expect("written");
            assert_eq!(look(&image, 16 << 20).await, Ok(Found::Nothing));
            let closer = look_closer(&image, 16 << 20).await;
            assert!(matches!(closer, Ok(Found::Signature { .. })), "{closer:?}");
            byte(0).expect("written");
        }
        assert!(matches!(
            look(&image, 17 << 20).await,
            Ok(Found::Unreadable(_))
        ));
        let missing = look(&scratch.path().join("none"), 16 << 20).await;
        assert!(matches!(missing, Ok(Found::Unreadable(_))), "{missing:?}");
        let uuid = Uuid::from_u128(0x1234_5678_9abc_4def_8123_4567_89ab_cdef);
        make(Filesystem::Ext4, uuid, &[], &image, true)
            .await
            .expect("made");
        let wanted = Found::Signature {
            kind: "ext4".into(),
            uuid: uuid.to_string(),
        };
        assert_eq!(look(&image, 16 << 20).await, Ok(wanted.clone()));
        // A journal of 1 MiB is not among what was written.
        if mkfs_ext4_takes_blank_devices().await.expect("asked") {
            let kept = std::os::unix::fs::MetadataExt::blocks(&file.metadata().expect("there"));
            assert!(kept * 512 < 512 << 10, "{kept}");
        }
        // Whole, and then with a hole in its inode table as of a mkfs that did not get there.
        let inside = look_inside(&image, wanted.clone(), uuid).await;
        assert_eq!(inside, Ok(wanted.clone()));
        let inside = look_inside(&image, wanted.clone(), Uuid::nil()).await;
        assert_eq!(inside, Ok(wanted.clone()), "not the one that was begun");
        let half = scratch.path().join("half");
        std::fs::copy(&image, &half).expect("copied");
        let holed = std::fs::OpenOptions::new().write(true).open(&half);
        let zeros = vec![0; 256 << 10];
        std::os::unix::fs::FileExt::write_all_at(&holed.expect("opened"), &zeros, 4 << 10)
            .expect("written");
        let inside = look_inside(&half, wanted, uuid).await;
        assert_eq!(
            inside,
            Ok(Found::Unfinished {
                kind: "ext4".into(),
                uuid: uuid.to_string(),
            })
        );
        let mounted = "Last mount time:          Fri Nov 27 07:00:12 2026\nMount count: 1\n";
        assert_eq!(last_mount(mounted), Some("Fri Nov 27 07:00:12 2026"));
        assert_eq!(last_mount(""), None);
        assert_eq!(last_mount("Last mount time:          n/a\n"), Some("n/a"));
        check(Filesystem::Ext4, &image).await.expect("sound");
        // Marked clean, with errors on record: whole after a closer look, and without the record.
        let superblock = async || superblock_of_ext4(&image).await.expect("told").stdout;
        let record = Child::new("debugfs").args(["-w", "-R", "ssv error_count 3"]);
        let recorded = record.arg(&image).run(PROBE_LIMIT).await;
        demand(recorded.expect("run")).expect("recorded");
        assert!(has_errors(&superblock().await));
        check(Filesystem::Ext4, &image).await.expect("sound");
        assert!(!has_errors(&superblock().await));
        let xfs = scratch.path().join("xfs");
        let file_of_xfs = std::fs::File::create_new(&xfs).expect("made");
        file_of_xfs
            .set_len(Filesystem::Xfs.minimum_bytes())
            .expect("sized");
        make(Filesystem::Xfs, uuid, &[], &xfs, true)
            .await
            .expect("made");
        let whole = look(&xfs, Filesystem::Xfs.minimum_bytes())
            .await
            .expect("looked");
        assert_eq!(
            look_inside(&xfs, whole.clone(), uuid).await,
            Ok(whole.clone())
        );
        // sb_inprogress, as mkfs.xfs leaves it until it is done.
        std::os::unix::fs::FileExt::write_all_at(&file_of_xfs, &[1], 126).expect("written");
        let inside = look_inside(&xfs, whole, uuid).await;
        assert!(matches!(inside, Ok(Found::Unfinished { .. })), "{inside:?}");
        // mkfs.xfs finds the first one and is not forced.
        file.set_len(Filesystem::Xfs.minimum_bytes())
            .expect("sized");
        assert!(
            make(Filesystem::Xfs, uuid, &[], &image, true)
                .await
                .is_err()
        );
        file.set_len(16 << 20).expect("sized");
        let garbage = vec![0xa5; 1 << 20];
        std::os::unix::fs::FileExt::write_all_at(&file, &garbage, 4 << 10).expect("written");
        assert!(check(Filesystem::Ext4, &image).await.is_err());
    }
}
