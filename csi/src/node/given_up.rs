//! Filesystems that gave up after an error: they are checked and mounted anew once nobody uses them.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::filesystem::PROBE_LIMIT;
use crate::capability::Filesystem;
use crate::child::Child;
use crate::mountinfo::{Mount, Mounts};
use crate::refusal::Refusal;

/// An ext4 that finds itself damaged takes no more writes: what it does not write cannot make it worse.
pub(super) const ON_ERROR: &str = "errors=remount-ro";

/// Whether the filesystem that is mounted at `point` gave up after an error: it takes no writes, or answers nothing at all,
/// until it is mounted anew.
pub(super) async fn has_given_up(mounts: &Mounts, point: &Path) -> Result<bool, Refusal> {
    let Some(mount) = mounts.at(point) else {
        return Ok(false);
    };
    if mount.is_file_system_read_only() {
        return Ok(true);
    }
    if mount.kind == Filesystem::Ext4.name() {
        // Kernels before 6.15 that do not say `ro` any more say it nowhere but in the number of errors, which is 0 after the
        // check before the mount.
        let name = name_of(mount.device);
        return Ok(name.is_some_and(|name| errors_of_ext4(&name) > 0 && gives_up(mount, &name)));
    }
    if mount.kind == Filesystem::Xfs.name() {
        // One that shut down shows it nowhere; everything that it is asked fails.
        let asked = Child::new("stat").args(["-c", "%i"]).arg(point);
        let asked = asked.run(PROBE_LIMIT).await?;
        return Ok(!asked.succeeded() && asked.stderr.contains("Input/output error"));
    }
    Ok(false)
}

/// How many errors a mounted ext4 saw since it was checked; 0 where the kernel does not say.
fn errors_of_ext4(name: &OsStr) -> u64 {
    let path = Path::new("/sys/fs/ext4").join(name).join("errors_count");
    let counted = std::fs::read_to_string(path).ok();
    let counted = counted.and_then(|text| text.trim().parse().ok());
    counted.unwrap_or(0)
}

/// Whether a mounted ext4 takes no more writes after an error. The table of mounts does not say what is in its superblock too.
fn gives_up(mount: &Mount, name: &OsStr) -> bool {
    let path = Path::new("/proc/fs/ext4").join(name).join("options");
    mount.has_file_system_option(ON_ERROR)
        || std::fs::read_to_string(path).is_ok_and(|all| all.lines().any(|line| line == ON_ERROR))
}

/// The kernel's name of a block device.
fn name_of((major, minor): (u32, u32)) -> Option<OsString> {
    let device = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    device.file_name().map(OsStr::to_owned)
}
