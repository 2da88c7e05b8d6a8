//! From messages to types that can be relied upon. The bounds are the interface's: strings 128 bytes, maps 4 KiB, node
//! ids 256 bytes.

use std::collections::{BTreeMap, HashMap};

use uuid::Uuid;

use crate::address::Address;
use crate::attach::Export;
use crate::capability::{Access, AccessMode, Capability};
use crate::controller::Place;
use crate::csi;
use crate::daemon::Volume;
use crate::mount_options;
use crate::refusal::Refusal;

const STRING_BYTES_MAX: usize = 128;
const NODE_ID_BYTES_MAX: usize = 256;
const MAP_BYTES_MAX: usize = 4096;
const EXPORT_KEY: &str = "export";
const SERVERS_KEY: &str = "servers";
const READ_ONLY_KEY: &str = "readOnly";
const EPOCH_KEY: &str = "epoch";

/// A field that is there, short enough, and of the characters the interface allows.
pub fn text<'a>(what: &str, value: &'a str, bytes_max: usize) -> Result<&'a str, Refusal> {
    if value.is_empty() {
        return Err(Refusal::invalid(format!("{what} is missing")));
    }
    if value.len() > bytes_max {
        return Err(Refusal::invalid(format!(
            "{what} is longer than {bytes_max} bytes"
        )));
    }
    let is_barred = |c: char| c.is_control() && !matches!(c, '\t' | '\n' | '\r');
    if value.chars().any(is_barred) {
        return Err(Refusal::invalid(format!("{what} has control characters")));
    }
    Ok(value)
}

/// A volume's name.
pub fn name(value: &str) -> Result<String, Refusal> {
    text("name", value, STRING_BYTES_MAX).map(str::to_owned)
}

/// A volume's id; `None` for one that no volume of this driver can have.
pub fn volume_id(value: &str) -> Result<Option<Uuid>, Refusal> {
    let value = text("volume_id", value, STRING_BYTES_MAX)?;
    // Only the one form that is given out, so that a volume has one id.
    Ok(Uuid::try_parse(value)
        .ok()
        .filter(|id| id.hyphenated().to_string() == value))
}

/// A volume's id; NOT_FOUND for one that no volume of this driver can have.
pub fn known_id(value: &str) -> Result<Uuid, Refusal> {
    volume_id(value)?.ok_or_else(|| Refusal::not_found(format!("there is no volume {value:?}")))
}

/// A node's id.
pub fn node_id(value: &str) -> Result<&str, Refusal> {
    text("node_id", value, NODE_ID_BYTES_MAX)
}

/// A map of strings.
pub fn map(
    what: &str,
    given: HashMap<String, String>,
) -> Result<BTreeMap<String, String>, Refusal> {
    let bytes: usize = given
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    if bytes > MAP_BYTES_MAX {
        return Err(Refusal::invalid(format!(
            "{what} is larger than {MAP_BYTES_MAX} bytes"
        )));
    }
    Ok(given.into_iter().collect())
}

/// One way of using a volume, which is given.
pub fn capability(given: Option<csi::VolumeCapability>) -> Result<Capability, Refusal> {
    use csi::volume_capability::AccessType;
    let given = given.ok_or_else(|| Refusal::invalid("volume_capability is missing"))?;
    let mode = given
        .access_mode
        .ok_or_else(|| Refusal::invalid("access_mode is missing"))?;
    let mode = access_mode(mode.mode())?;
    let access = match given.access_type {
        None => return Err(Refusal::invalid("access_type is missing: block or mount")),
        Some(AccessType::Block(_)) => Access::Block,
        Some(AccessType::Mount(mount)) => {
            if !mount.volume_mount_group.is_empty() {
                return Err(Refusal::invalid(
                    "volume_mount_group is not supported; the orchestrator sets the group",
                ));
            }
            let filesystem = match mount.fs_type.as_str() {
                "" => None,
                other => Some(other.parse().map_err(Refusal::invalid)?),
            };
            mount_options::check(&mount.mount_flags)?;
            Access::Mount {
                filesystem,
                options: mount.mount_flags,
            }
        }
    };
    Ok(Capability { access, mode })
}

/// Several ways of using a volume, of which there is at least one.
pub fn capabilities(given: Vec<csi::VolumeCapability>) -> Result<Vec<Capability>, Refusal> {
    if given.is_empty() {
        return Err(Refusal::invalid("volume_capabilities are missing"));
    }
    given
        .into_iter()
        .map(|each| capability(Some(each)))
        .collect()
}

fn access_mode(mode: csi::volume_capability::access_mode::Mode) -> Result<AccessMode, Refusal> {
    use csi::volume_capability::access_mode::Mode;
    match mode {
        Mode::Unknown => Err(Refusal::invalid("access_mode is missing or unknown")),
        Mode::SingleNodeWriter => Ok(AccessMode::SingleNodeWriter),
        Mode::SingleNodeReaderOnly => Ok(AccessMode::SingleNodeReaderOnly),
        Mode::MultiNodeReaderOnly => Ok(AccessMode::MultiNodeReaderOnly),
        Mode::SingleNodeSingleWriter => Ok(AccessMode::SingleNodeSingleWriter),
        Mode::SingleNodeMultiWriter => Ok(AccessMode::SingleNodeMultiWriter),
        Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter => Err(Refusal::invalid(format!(
            "{} is not supported: a volume is written by one node",
            mode.as_str_name()
        ))),
    }
}

/// Places a volume must, or should, be reachable from.
pub fn places(given: Vec<csi::Topology>) -> Result<Vec<Place>, Refusal> {
    given
        .into_iter()
        .map(|topology| map("topology", topology.segments))
        .collect()
}

/// A number of bytes as the interface has it.
pub fn bytes(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// What is told of a volume that can be used in `places`.
pub fn volume(volume: &Volume, context: BTreeMap<String, String>, places: &[Place]) -> csi::Volume {
    csi::Volume {
        capacity_bytes: bytes(volume.size_bytes),
        volume_id: volume.id.to_string(),
        volume_context: context.into_iter().collect(),
        content_source: None,
        accessible_topology: places
            .iter()
            .map(|place| csi::Topology {
                segments: place.clone().into_iter().collect(),
            })
            .collect(),
    }
}

/// What the controller hands to the node, through the orchestrator.
pub fn publish_context(export: &Export) -> HashMap<String, String> {
    let servers: Vec<String> = export.servers.iter().map(Address::to_string).collect();
    HashMap::from([
        (EXPORT_KEY.to_owned(), export.name.clone()),
        (SERVERS_KEY.to_owned(), servers.join(",")),
        (READ_ONLY_KEY.to_owned(), export.read_only.to_string()),
        (EPOCH_KEY.to_owned(), export.epoch.to_string()),
    ])
}

/// What the controller handed to the node. `None` when nothing was handed over.
pub fn export(id: Uuid, context: HashMap<String, String>) -> Result<Option<Export>, Refusal> {
    if context.is_empty() {
        return Ok(None);
    }
    let context = map("publish_context", context)?;
    let wrong = |what: &str| Refusal::invalid(format!("publish_context: {what} is missing or odd"));
    let value = |key: &str| context.get(key).ok_or_else(|| wrong(key));
    let name = value(EXPORT_KEY)?;
    // An export of another volume under this id would be formatted or mounted as this one.
    let is_own = name
        .strip_prefix(&id.to_string())
        .is_some_and(|rest| rest.len() > 1 && rest.starts_with('@'));
    if !is_own || name.chars().any(char::is_control) {
        return Err(Refusal::invalid(
            "publish_context: the export is not of this volume",
        ));
    }
    let servers = value(SERVERS_KEY)?
        .split(',')
        .map(str::parse)
        .collect::<Result<Vec<Address>, String>>()
        .map_err(|error| Refusal::invalid(format!("publish_context: {error}")))?;
    Ok(Some(Export {
        volume: id,
        name: name.clone(),
        servers,
        read_only: value(READ_ONLY_KEY)?
            .parse()
            .map_err(|_| wrong(READ_ONLY_KEY))?,
        epoch: value(EPOCH_KEY)?.parse().map_err(|_| wrong(EPOCH_KEY))?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refusal::Class;
    use csi::volume_capability::access_mode::Mode;
    use csi::volume_capability::{AccessMode as Wire, AccessType, BlockVolume, MountVolume};

    fn wire(mode: Mode, access_type: Option<AccessType>) -> csi::VolumeCapability {
        csi::VolumeCapability {
            access_mode: Some(Wire { mode: mode.into() }),
            access_type,
        }
    }

    fn mount(fs_type: &str, flags: &[&str]) -> Option<AccessType> {
        Some(AccessType::Mount(MountVolume {
            fs_type: fs_type.into(),
            mount_flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
            volume_mount_group: String::new(),
        }))
    }

    #[test]
    fn capabilities_are_read_and_the_unsupported_refused() {
        let read = capability(Some(wire(
            Mode::SingleNodeWriter,
            mount("xfs", &["noatime"]),
        )));
        let Ok(Capability {
            access:
                Access::Mount {
                    filesystem,
                    options,
                },
            mode,
        }) = read
        else {
            panic!("{read:?}");
        };
        assert_eq!(filesystem.map(|f| f.name()), Some("xfs"));
        assert_eq!(
            (options, mode),
            (vec!["noatime".to_owned()], AccessMode::SingleNodeWriter)
        );
        let block = || Some(AccessType::Block(BlockVolume {}));
        assert!(capability(Some(wire(Mode::MultiNodeReaderOnly, block()))).is_ok());
        let many = "x".repeat(4096);
        for refused in [
            None,
            Some(csi::VolumeCapability {
                access_mode: None,
                access_type: block(),
            }),
            Some(wire(Mode::SingleNodeWriter, None)),
            Some(wire(Mode::Unknown, block())),
            Some(wire(Mode::MultiNodeMultiWriter, block())),
            Some(wire(Mode::MultiNodeSingleWriter, block())),
            Some(wire(Mode::SingleNodeWriter, mount("btrfs", &[]))),
            Some(wire(
                Mode::SingleNodeWriter,
                mount("ext4", &["noatime,bind"]),
            )),
            Some(wire(
                Mode::SingleNodeWriter,
                mount("ext4", &["loop=/dev/loop0"]),
            )),
            Some(wire(
                Mode::SingleNodeWriter,
                mount("ext4", &["X-mount.mkdir"]),
            )),
            Some(wire(Mode::SingleNodeWriter, mount("ext4", &[""]))),
            Some(wire(Mode::SingleNodeWriter, mount("ext4", &["a\nb"]))),
            Some(wire(Mode::SingleNodeWriter, mount("ext4", &[&many]))),
        ] {
            let error = capability(refused.clone()).expect_err(&format!("{refused:?}"));
            assert_eq!(error.class, Class::InvalidArgument);
            assert!(!error.message.contains("loop0"), "flags are not repeated");
        }
        assert!(capabilities(Vec::new()).is_err());
    }

    #[test]
    fn hostile_ids_are_no_volumes() {
        let id = Uuid::from_u128(77);
        assert_eq!(volume_id(&id.to_string()), Ok(Some(id)));
        for none in [
            "../../etc/passwd",
            "reallyfakevolumeid",
            &id.simple().to_string(),
            &id.braced().to_string(),
            &format!("{id}@token"),
            &format!("{id}/x"),
        ] {
            assert_eq!(volume_id(none), Ok(None), "{none}");
            assert_eq!(known_id(none).expect_err(none).class, Class::NotFound);
        }
        for wrong in ["", "a\0b", &"v".repeat(129)] {
            assert_eq!(
                volume_id(wrong).expect_err(wrong).class,
                Class::InvalidArgument
            );
        }
        assert!(name(&"n".repeat(128)).is_ok() && name(&"n".repeat(129)).is_err());
        assert!(node_id(&"n".repeat(256)).is_ok() && node_id(&"n".repeat(257)).is_err());
        assert!(map("m", HashMap::from([("k".into(), "v".repeat(4096))])).is_err());
    }

    #[test]
    fn what_the_controller_hands_over_arrives() {
        let id = Uuid::from_u128(9);
        let given = Export {
            volume: id,
            name: format!("{id}@secret"),
            servers: vec![
                "unix:/run/nbd.sock".parse().expect("one"),
                "tcp:h:1".parse().expect("one"),
            ],
            read_only: true,
            epoch: 12,
        };
        let context = publish_context(&given);
        assert_eq!(export(id, context.clone()), Ok(Some(given)));
        assert_eq!(export(id, HashMap::new()), Ok(None));
        let other = Uuid::from_u128(10);
        assert!(export(other, context.clone()).is_err(), "of another volume");
        for key in [EXPORT_KEY, SERVERS_KEY, READ_ONLY_KEY, EPOCH_KEY] {
            let mut short = context.clone();
            short.remove(key);
            assert!(export(id, short).is_err(), "{key}");
            let mut odd = context.clone();
            odd.insert(key.to_owned(), "?".to_owned());
            assert!(export(id, odd).is_err(), "{key}");
        }
    }
}
