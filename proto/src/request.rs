//! What a client sent, checked.
//!
//! A generated message is an unverified thing: every string may be empty and every number anything. The types here
//! exist only for requests whose fields passed; what did not is a [`FieldError`], which becomes INVALID_ARGUMENT with
//! the field's name in it.

use std::{fmt, time::Duration};

use uuid::Uuid;

use crate::{admin, name};

/// A field of a request that is missing or out of bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// The field as the proto file spells it.
    pub field: &'static str,
    /// What is wrong with it, as a sentence without its full stop.
    pub problem: String,
}

impl FieldError {
    /// A problem with one field.
    pub fn new(field: &'static str, problem: impl fmt::Display) -> FieldError {
        FieldError {
            field,
            problem: problem.to_string(),
        }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

impl std::error::Error for FieldError {}

impl From<FieldError> for tonic::Status {
    fn from(error: FieldError) -> tonic::Status {
        tonic::Status::invalid_argument(error.to_string())
    }
}

/// A volume as people and programs point at one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeRef {
    /// By its id.
    Id(Uuid),
    /// By its name, which passed [`name::check`].
    Name(String),
}

impl VolumeRef {
    /// Reads the field `volume` of a request.
    pub fn parse(volume: &str) -> Result<VolumeRef, FieldError> {
        if volume.is_empty() {
            return Err(FieldError::new(
                "volume",
                "give the name or the id of a volume",
            ));
        }
        if let Ok(id) = Uuid::try_parse(volume) {
            return Ok(VolumeRef::Id(id));
        }
        name::check(volume).map_err(|e| FieldError::new("volume", e))?;
        Ok(VolumeRef::Name(volume.to_owned()))
    }

    /// The same where an empty field means "all".
    pub fn parse_optional(volume: &str) -> Result<Option<VolumeRef>, FieldError> {
        if volume.is_empty() {
            Ok(None)
        } else {
            VolumeRef::parse(volume).map(Some)
        }
    }
}

impl fmt::Display for VolumeRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VolumeRef::Id(id) => write!(f, "{id}"),
            VolumeRef::Name(name) => write!(f, "{name}"),
        }
    }
}

/// Largest size of a volume, in bytes. A chunk's index has 32 bits, which would reach 256 PiB; at 12 MiB of directory a
/// TiB written, 8 PiB already is more than one daemon's memory holds, so a larger size is a slip of the keyboard.
pub const SIZE_BYTES_MAX: u64 = 8 << 50;

/// The multiple that sizes of volumes are rounded up to, in bytes: a block.
pub const SIZE_BYTES_MULTIPLE: u64 = 4096;

/// Rounds a size up to whole blocks and checks its bounds.
fn checked_size(size_bytes: u64) -> Result<u64, FieldError> {
    if size_bytes == 0 {
        return Err(FieldError::new(
            "size_bytes",
            "a volume has at least 1 byte",
        ));
    }
    if size_bytes > SIZE_BYTES_MAX {
        return Err(FieldError::new(
            "size_bytes",
            format_args!(
                "a volume has at most {SIZE_BYTES_MAX} bytes (8 PiB), {size_bytes} were asked for"
            ),
        ));
    }
    Ok(size_bytes.next_multiple_of(SIZE_BYTES_MULTIPLE))
}

/// Reads a UUID.
fn uuid(field: &'static str, text: &str) -> Result<Uuid, FieldError> {
    Uuid::try_parse(text)
        .map_err(|_| FieldError::new(field, format_args!("{text:?} is not a UUID")))
}

/// A UUID where an empty field means "all".
fn optional_uuid(field: &'static str, text: &str) -> Result<Option<Uuid>, FieldError> {
    if text.is_empty() {
        Ok(None)
    } else {
        uuid(field, text).map(Some)
    }
}

/// A volume to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateVolume {
    /// Passed [`name::check`].
    pub name: String,
    /// At least one block, a multiple of a block, at most [`SIZE_BYTES_MAX`].
    pub size_bytes: u64,
    /// See `Volume.read_only`.
    pub read_only: bool,
    /// See `Volume.write_through`.
    pub write_through: bool,
}

impl TryFrom<admin::CreateVolumeRequest> for CreateVolume {
    type Error = FieldError;

    fn try_from(request: admin::CreateVolumeRequest) -> Result<CreateVolume, FieldError> {
        name::check(&request.name).map_err(|e| FieldError::new("name", e))?;
        Ok(CreateVolume {
            size_bytes: checked_size(request.size_bytes)?,
            name: request.name,
            read_only: request.read_only,
            write_through: request.write_through,
        })
    }
}

/// A volume to give another name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenameVolume {
    /// Which.
    pub volume: VolumeRef,
    /// Passed [`name::check`].
    pub new_name: String,
}

impl TryFrom<admin::RenameVolumeRequest> for RenameVolume {
    type Error = FieldError;

    fn try_from(request: admin::RenameVolumeRequest) -> Result<RenameVolume, FieldError> {
        let volume = VolumeRef::parse(&request.volume)?;
        name::check(&request.new_name).map_err(|e| FieldError::new("new_name", e))?;
        Ok(RenameVolume {
            volume,
            new_name: request.new_name,
        })
    }
}

/// A volume to make larger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResizeVolume {
    /// Which.
    pub volume: VolumeRef,
    /// As in [`CreateVolume::size_bytes`]; not yet compared with the present size.
    pub size_bytes: u64,
}

impl TryFrom<admin::ResizeVolumeRequest> for ResizeVolume {
    type Error = FieldError;

    fn try_from(request: admin::ResizeVolumeRequest) -> Result<ResizeVolume, FieldError> {
        Ok(ResizeVolume {
            volume: VolumeRef::parse(&request.volume)?,
            size_bytes: checked_size(request.size_bytes)?,
        })
    }
}

/// Settings to change. At least one is present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetVolume {
    /// Which.
    pub volume: VolumeRef,
    /// See `Volume.read_only`.
    pub read_only: Option<bool>,
    /// See `Volume.write_through`.
    pub write_through: Option<bool>,
}

impl TryFrom<admin::SetVolumeRequest> for SetVolume {
    type Error = FieldError;

    fn try_from(request: admin::SetVolumeRequest) -> Result<SetVolume, FieldError> {
        let volume = VolumeRef::parse(&request.volume)?;
        if request.read_only.is_none() && request.write_through.is_none() {
            return Err(FieldError::new(
                "read_only, write_through",
                "give at least one setting to change",
            ));
        }
        Ok(SetVolume {
            volume,
            read_only: request.read_only,
            write_through: request.write_through,
        })
    }
}

/// A scrub to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scrub {
    /// One store, or all.
    pub store_id: Option<Uuid>,
    /// Bytes read a second; `None` takes the daemon's setting.
    pub rate_bytes_per_second: Option<u64>,
}

/// Slowest scrub that can be asked for, in bytes a second: slower than this, one GiB takes more than four hours.
pub const SCRUB_RATE_BYTES_MIN: u64 = 64 << 10;

impl TryFrom<admin::ScrubRequest> for Scrub {
    type Error = FieldError;

    fn try_from(request: admin::ScrubRequest) -> Result<Scrub, FieldError> {
        let rate_bytes_per_second = match request.rate_bytes_per_second {
            0 => None,
            rate if rate < SCRUB_RATE_BYTES_MIN => {
                return Err(FieldError::new(
                    "rate_bytes_per_second",
                    format_args!("at least {SCRUB_RATE_BYTES_MIN}, or 0 for the daemon's setting"),
                ));
            }
            rate => Some(rate),
        };
        Ok(Scrub {
            store_id: optional_uuid("store_id", &request.store_id)?,
            rate_bytes_per_second,
        })
    }
}

/// A checkpoint to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// One store, or all.
    pub store_id: Option<Uuid>,
}

impl TryFrom<admin::CheckpointRequest> for Checkpoint {
    type Error = FieldError;

    fn try_from(request: admin::CheckpointRequest) -> Result<Checkpoint, FieldError> {
        Ok(Checkpoint {
            store_id: optional_uuid("store_id", &request.store_id)?,
        })
    }
}

/// Samples to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchStats {
    /// Between two samples.
    pub interval: Duration,
}

impl TryFrom<admin::WatchStatsRequest> for WatchStats {
    type Error = FieldError;

    fn try_from(request: admin::WatchStatsRequest) -> Result<WatchStats, FieldError> {
        match request.interval_ms {
            0 => Ok(WatchStats {
                interval: Duration::from_millis(1000),
            }),
            ms @ 100..=60_000 => Ok(WatchStats {
                interval: Duration::from_millis(u64::from(ms)),
            }),
            ms => Err(FieldError::new(
                "interval_ms",
                format_args!("100 to 60000, or 0 for 1000; not {ms}"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(name: &str, size_bytes: u64) -> Result<CreateVolume, FieldError> {
        CreateVolume::try_from(admin::CreateVolumeRequest {
            name: name.into(),
            size_bytes,
            ..Default::default()
        })
    }

    #[test]
    fn sizes_are_rounded_up_and_bounded() {
        assert_eq!(create("a", 1).map(|v| v.size_bytes), Ok(4096));
        assert_eq!(create("a", 4096).map(|v| v.size_bytes), Ok(4096));
        assert_eq!(create("a", 4097).map(|v| v.size_bytes), Ok(8192));
        assert_eq!(
            create("a", SIZE_BYTES_MAX).map(|v| v.size_bytes),
            Ok(SIZE_BYTES_MAX)
        );
        for bad in [0, SIZE_BYTES_MAX + 1, u64::MAX] {
            assert_eq!(create("a", bad).expect_err("refused").field, "size_bytes");
        }
    }

    #[test]
    fn a_bad_name_is_told_with_its_field() {
        let error = create("a/b", 1).expect_err("refused");
        assert_eq!(error.field, "name");
        let status = tonic::Status::from(error);
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        assert!(
            status.message().starts_with("name: "),
            "{}",
            status.message()
        );
    }

    #[test]
    fn a_volume_is_meant_by_name_or_id() {
        let id = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        assert_eq!(
            VolumeRef::parse(id),
            Ok(VolumeRef::Id(Uuid::try_parse(id).expect("a UUID")))
        );
        assert_eq!(VolumeRef::parse("data"), Ok(VolumeRef::Name("data".into())));
        assert_eq!(VolumeRef::parse_optional(""), Ok(None));
        for bad in ["", "../data", "a b"] {
            assert_eq!(VolumeRef::parse(bad).expect_err("refused").field, "volume");
        }
    }

    #[test]
    fn a_change_of_nothing_is_refused() {
        let request = admin::SetVolumeRequest {
            volume: "a".into(),
            ..Default::default()
        };
        assert!(SetVolume::try_from(request).is_err());
    }

    #[test]
    fn intervals_and_rates_are_bounded() {
        let watch = |interval_ms| WatchStats::try_from(admin::WatchStatsRequest { interval_ms });
        assert_eq!(watch(0).map(|w| w.interval), Ok(Duration::from_secs(1)));
        assert!(watch(99).is_err() && watch(60_001).is_err() && watch(100).is_ok());
        let scrub = |rate_bytes_per_second, store_id: &str| {
            Scrub::try_from(admin::ScrubRequest {
                store_id: store_id.into(),
                rate_bytes_per_second,
            })
        };
        assert!(scrub(1, "").is_err() && scrub(0, "nonsense").is_err());
        assert_eq!(
            scrub(0, ""),
            Ok(Scrub {
                store_id: None,
                rate_bytes_per_second: None
            })
        );
    }

    #[test]
    fn the_descriptors_hold_the_service() {
        use prost::Message;
        let set =
            prost_types::FileDescriptorSet::decode(crate::FILE_DESCRIPTOR_SET).expect("decodes");
        let admin = set
            .file
            .iter()
            .find(|f| f.package() == "ashlar.admin.v1")
            .expect("the package");
        assert_eq!(admin.service[0].name(), "Admin");
        assert_eq!(admin.service[0].method.len(), 13);
    }
}
