//! The parameters of a StorageClass, and those of a VolumeAttributesClass. An unknown key is refused: a typing error in a
//! class must not pass for a default.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use crate::capability::Filesystem;
use crate::refusal::Refusal;

/// What is made on a volume whose claim leaves it open.
pub const FILESYSTEM: &str = "filesystem";
/// More arguments for mkfs.
pub const MKFS_OPTIONS: &str = "mkfsOptions";
/// Acknowledge writes only when they are durable.
pub const WRITE_THROUGH: &str = "writeThrough";
/// Copies of each chunk.
pub const REPLICAS: &str = "replicas";
/// Copies that must be in sync for a write to be answered.
pub const MIN_IN_SYNC: &str = "minInSync";
/// Zones whose nodes may hold copies, with commas between them.
pub const ZONES: &str = "zones";
/// Bound on requests a second. Mutable.
pub const IOPS: &str = "iops";
/// Bound on payload a second. Mutable.
pub const BYTES_PER_SECOND: &str = "bytesPerSecond";
/// What the external provisioner adds with `--extra-create-metadata`.
const METADATA: [&str; 3] = [
    "csi.storage.k8s.io/pvc/name",
    "csi.storage.k8s.io/pvc/namespace",
    "csi.storage.k8s.io/pv/name",
];

/// What a volume is made with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// See [`FILESYSTEM`].
    pub filesystem: Option<Filesystem>,
    /// See [`MKFS_OPTIONS`].
    pub mkfs_options: Vec<String>,
    /// See [`WRITE_THROUGH`].
    pub write_through: bool,
    /// See [`REPLICAS`]; `None` leaves it to the daemon.
    pub replicas: Option<u32>,
    /// See [`MIN_IN_SYNC`]; `None` leaves it to the daemon.
    pub min_in_sync: Option<u32>,
    /// See [`ZONES`]; empty is all.
    pub zones: Vec<String>,
    /// What can be changed later.
    pub mutable: Mutable,
    /// For people: whose claim it is.
    pub metadata: BTreeMap<String, String>,
}

/// What can be changed while a volume is used. `None` leaves it as it is, 0 removes the bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mutable {
    /// See [`IOPS`].
    pub iops: Option<u64>,
    /// See [`BYTES_PER_SECOND`].
    pub bytes_per_second: Option<u64>,
}

impl Parameters {
    /// Reads the parameters of a class; `mutable` ones take precedence.
    pub fn parse(
        given: &BTreeMap<String, String>,
        mutable: &BTreeMap<String, String>,
    ) -> Result<Parameters, Refusal> {
        let mut parameters = Parameters::default();
        for (key, value) in given {
            match key.as_str() {
                FILESYSTEM => parameters.filesystem = Some(read(key, value)?),
                MKFS_OPTIONS => parameters.mkfs_options = split(value),
                WRITE_THROUGH => parameters.write_through = read(key, value)?,
                REPLICAS => parameters.replicas = Some(within(key, value, 1..=7)?),
                MIN_IN_SYNC => parameters.min_in_sync = Some(within(key, value, 1..=7)?),
                ZONES => parameters.zones = zones(value)?,
                IOPS | BYTES_PER_SECOND => parameters.mutable.set(key, value)?,
                key if METADATA.contains(&key) => {
                    parameters.metadata.insert(key.to_owned(), value.clone());
                }
                _ => return Err(unknown(key)),
            }
        }
        for (key, value) in mutable {
            parameters.mutable.set(key, value)?;
        }
        if !parameters.mkfs_options.is_empty() && parameters.filesystem.is_none() {
            return Err(Refusal::invalid(format!(
                "{MKFS_OPTIONS} needs {FILESYSTEM}: each filesystem has its own options"
            )));
        }
        if let (Some(least), Some(copies)) = (parameters.min_in_sync, parameters.replicas)
            && least > copies
        {
            return Err(Refusal::invalid(format!(
                "{MIN_IN_SYNC}: of {copies} copies {least} cannot be in sync"
            )));
        }
        if let Some(filesystem) = parameters.filesystem {
            check_mkfs_options(filesystem, &parameters.mkfs_options)?;
        }
        Ok(parameters)
    }
}

impl Mutable {
    /// Reads the parameters of a VolumeAttributesClass: all of them, before any is applied.
    pub fn parse(given: &BTreeMap<String, String>) -> Result<Mutable, Refusal> {
        let mut mutable = Mutable::default();
        for (key, value) in given {
            mutable.set(key, value)?;
        }
        Ok(mutable)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), Refusal> {
        match key {
            IOPS => self.iops = Some(bound(key, value, 10)?),
            BYTES_PER_SECOND => self.bytes_per_second = Some(bound(key, value, 1 << 20)?),
            _ => return Err(unknown(key)),
        }
        Ok(())
    }
}

/// What a volume's context says of making a file system: which, and with which arguments. It came through an orchestrator,
/// so it is checked again before it reaches a command line.
pub fn of_context(
    context: &BTreeMap<String, String>,
) -> Result<(Filesystem, Vec<String>), Refusal> {
    let filesystem = match context.get(FILESYSTEM) {
        None => Filesystem::Ext4,
        Some(name) => name.parse().map_err(Refusal::invalid)?,
    };
    let options = context.get(MKFS_OPTIONS).map(|options| split(options));
    let options = options.unwrap_or_default();
    check_mkfs_options(filesystem, &options)?;
    Ok((filesystem, options))
}

fn split(options: &str) -> Vec<String> {
    options
        .split_ascii_whitespace()
        .map(str::to_owned)
        .collect()
}

/// Names with commas, and blanks where somebody likes them; none of them empty, for a class that confines to nothing is a
/// mistake.
fn zones(value: &str) -> Result<Vec<String>, Refusal> {
    let names: Vec<String> = value
        .split(',')
        .map(|name| name.trim().to_owned())
        .collect();
    if names.iter().any(String::is_empty) {
        return Err(Refusal::invalid(format!(
            "{ZONES}: {value:?} has an empty name in it; leave {ZONES} out for all zones"
        )));
    }
    Ok(names)
}

fn unknown(key: &str) -> Refusal {
    Refusal::invalid(format!("there is no parameter {key:?}"))
}

fn read<T: FromStr>(key: &str, value: &str) -> Result<T, Refusal>
where
    T::Err: Display,
{
    value
        .parse()
        .map_err(|error| Refusal::invalid(format!("{key}: {value:?}: {error}")))
}

fn within(key: &str, value: &str, range: std::ops::RangeInclusive<u32>) -> Result<u32, Refusal> {
    let number = read(key, value)?;
    if range.contains(&number) {
        Ok(number)
    } else {
        Err(Refusal::invalid(format!(
            "{key}: {number} is not in {range:?}"
        )))
    }
}

/// A bound is 0, which is none, or at least what the daemon can keep.
fn bound(key: &str, value: &str, least: u64) -> Result<u64, Refusal> {
    let number = read(key, value)?;
    if number == 0 || number >= least {
        Ok(number)
    } else {
        Err(Refusal::invalid(format!(
            "{key}: {number} is less than {least}; 0 removes the bound"
        )))
    }
}

/// Options that shape a filesystem, and none that forces mkfs, writes elsewhere or reads a file. Each takes a value.
const EXT4_OPTIONS: [&str; 11] = [
    "-b", "-C", "-g", "-G", "-i", "-I", "-J", "-m", "-N", "-O", "-T",
];
const XFS_OPTIONS: [&str; 6] = ["-b", "-d", "-i", "-l", "-n", "-s"];
/// Parts of values that name another device or file.
const ELSEWHERE: [&str; 6] = ["file", "name=", "logdev", "rtdev", "device=", "/"];

/// Checks the arguments that go before the device to mkfs.
fn check_mkfs_options(filesystem: Filesystem, options: &[String]) -> Result<(), Refusal> {
    let allowed: &[&str] = match filesystem {
        Filesystem::Ext4 => &EXT4_OPTIONS,
        Filesystem::Xfs => &XFS_OPTIONS,
    };
    let mut rest = options.iter();
    while let Some(option) = rest.next() {
        if !allowed.contains(&option.as_str()) {
            return Err(Refusal::invalid(format!(
                "{MKFS_OPTIONS}: {option:?} is not one of {} with a value after a blank",
                allowed.join(" ")
            )));
        }
        let value = rest.next().filter(|value| {
            !value.starts_with('-') && !ELSEWHERE.iter().any(|part| value.contains(part))
        });
        if value.is_none() {
            return Err(Refusal::invalid(format!(
                "{MKFS_OPTIONS}: {option} has no value, or one that is not allowed"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn parse(pairs: &[(&str, &str)]) -> Result<Parameters, Refusal> {
        Parameters::parse(&map(pairs), &BTreeMap::new())
    }

    #[test]
    fn a_class_is_read() {
        let parameters = Parameters::parse(
            &map(&[
                ("filesystem", "xfs"),
                ("mkfsOptions", "-i size=512 -n  ftype=1"),
                ("writeThrough", "true"),
                ("replicas", "3"),
                ("zones", "eu-1a, eu-1b"),
                ("minInSync", "1"),
                ("iops", "500"),
                ("csi.storage.k8s.io/pvc/name", "data"),
            ]),
            &map(&[("iops", "1000"), ("bytesPerSecond", "0")]),
        )
        .expect("read");
        assert_eq!(parameters.filesystem, Some(Filesystem::Xfs));
        assert_eq!(parameters.mkfs_options, ["-i", "size=512", "-n", "ftype=1"]);
        assert!(parameters.write_through);
        assert_eq!(parameters.replicas, Some(3));
        assert_eq!(parameters.min_in_sync, Some(1));
        assert_eq!(parameters.zones, ["eu-1a", "eu-1b"]);
        assert_eq!(parameters.mutable.iops, Some(1000));
        assert_eq!(parameters.mutable.bytes_per_second, Some(0));
        assert_eq!(parameters.metadata.len(), 1);
        assert_eq!(parse(&[]), Ok(Parameters::default()));
    }

    #[test]
    fn what_comes_back_through_an_orchestrator_is_checked_again() {
        let context = map(&[("filesystem", "xfs"), ("mkfsOptions", "-i  size=512")]);
        let options = ["-i", "size=512"].map(str::to_owned).to_vec();
        assert_eq!(of_context(&context), Ok((Filesystem::Xfs, options)));
        assert_eq!(of_context(&map(&[])), Ok((Filesystem::Ext4, Vec::new())));
        assert!(of_context(&map(&[("mkfsOptions", "-F")])).is_err());
        assert!(of_context(&map(&[("filesystem", "ntfs")])).is_err());
    }

    #[test]
    fn what_is_unknown_or_wrong_is_refused() {
        for wrong in [
            &[("fileSystem", "xfs")][..],
            &[("filesystem", "btrfs")],
            &[("writeThrough", "yes")],
            &[("replicas", "0")],
            &[("replicas", "-1")],
            &[("replicas", "8")],
            &[("zones", "")],
            &[("zones", "a,,b")],
            &[("minInSync", "0")],
            &[("replicas", "2"), ("minInSync", "3")],
            &[("iops", "9")],
            &[("iops", "many")],
            &[("bytesPerSecond", "1000")],
            &[("mkfsOptions", "-b 4096")],
            &[("filesystem", "ext4"), ("mkfsOptions", "-F")],
            &[("filesystem", "ext4"), ("mkfsOptions", "-b 4096 -F")],
            &[("filesystem", "ext4"), ("mkfsOptions", "-b -F")],
            &[("filesystem", "ext4"), ("mkfsOptions", "-U random")],
            &[
                ("filesystem", "ext4"),
                ("mkfsOptions", "-J device=/dev/sda"),
            ],
            &[("filesystem", "ext4"), ("mkfsOptions", "-b")],
            &[("filesystem", "xfs"), ("mkfsOptions", "-f")],
            &[("filesystem", "xfs"), ("mkfsOptions", "-l logdev=/dev/sda")],
            &[("filesystem", "xfs"), ("mkfsOptions", "-d file,name=x")],
            &[("filesystem", "xfs"), ("mkfsOptions", "/dev/sda")],
            &[("csi.storage.k8s.io/fstype", "ext4")],
        ] {
            let refused = parse(wrong).expect_err(&format!("{wrong:?}"));
            assert_eq!(refused.class, crate::refusal::Class::InvalidArgument);
        }
        assert!(Mutable::parse(&map(&[("filesystem", "ext4")])).is_err());
        assert!(Mutable::parse(&map(&[("iops", "100"), ("nonsense", "1")])).is_err());
    }
}
