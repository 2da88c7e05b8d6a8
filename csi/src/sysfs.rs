//! What the kernel says of block devices: `/sys/block`.

use std::io;
use std::path::{Path, PathBuf};

/// The kernel's unit of a device's size.
const SECTOR_BYTES: u64 = 512;

/// Names of block devices that begin with `prefix`, sorted.
pub fn devices(prefix: &str) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir("/sys/block")? {
        if let Ok(name) = entry?.file_name().into_string()
            && name.starts_with(prefix)
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// One attribute of a block device, without the newline; `None` when there is no such device or attribute.
pub fn attribute(device: &str, name: &str) -> Option<String> {
    let path = Path::new("/sys/block").join(device).join(name);
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim_end_matches('\n').to_owned())
}

/// Size of a block device; `None` when there is no such device.
pub fn size_bytes(device: &str) -> Option<u64> {
    let sectors: u64 = attribute(device, "size")?.parse().ok()?;
    sectors.checked_mul(SECTOR_BYTES)
}

/// Its number.
pub fn number(device: &str) -> Option<(u32, u32)> {
    let text = attribute(device, "dev")?;
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Where its node is.
pub fn node(device: &str) -> PathBuf {
    Path::new("/dev").join(device)
}

/// Identifies the present run of the kernel.
pub fn boot_id() -> io::Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(text.trim().to_owned())
}
