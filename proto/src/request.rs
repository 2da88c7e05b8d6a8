//! What a client sent, checked.
//!
//! A generated message is an unverified thing: every string may be empty and every number anything. The types here
//! exist only for requests whose fields passed; what did not is a [`FieldError`], which becomes INVALID_ARGUMENT with
//! the field's name in it. What a volume may be called and how large it may be is decided in `ashlar-core`.

use std::{fmt, time::Duration};

use uuid::Uuid;

use crate::admin;

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
    /// By its name; any text, it is only looked up.
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

/// Settings to change. At least one is present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetVolume {
    /// Which.
    pub volume: VolumeRef,
    /// See `Volume.read_only`.
    pub read_only: Option<bool>,
    /// See `Volume.write_through`.
    pub write_through: Option<bool>,
    /// See `VolumeLimits.iops`.
    pub iops: Option<u64>,
    /// See `VolumeLimits.bytes_per_second`.
    pub bytes_per_second: Option<u64>,
    /// See `Volume.min_in_sync`.
    pub min_in_sync: Option<u32>,
    /// See `Volume.zones`.
    pub zones: Option<Vec<String>>,
}

impl TryFrom<admin::SetVolumeRequest> for SetVolume {
    type Error = FieldError;

    fn try_from(request: admin::SetVolumeRequest) -> Result<SetVolume, FieldError> {
        let volume = VolumeRef::parse(&request.volume)?;
        let limits = request.iops.or(request.bytes_per_second);
        let switches = request.read_only.or(request.write_through);
        let copies = request.min_in_sync.is_some() || request.zones.is_some();
        if switches.is_none() && limits.is_none() && !copies {
            return Err(FieldError::new(
                "read_only, write_through, iops, bytes_per_second, min_in_sync, zones",
                "give at least one setting to change",
            ));
        }
        Ok(SetVolume {
            volume,
            read_only: request.read_only,
            write_through: request.write_through,
            iops: request.iops,
            bytes_per_second: request.bytes_per_second,
            min_in_sync: request.min_in_sync,
            zones: request.zones.map(|zones| zones.names),
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

    #[test]
    fn a_volume_is_meant_by_name_or_id() {
        let id = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        assert_eq!(
            VolumeRef::parse(id),
            Ok(VolumeRef::Id(Uuid::try_parse(id).expect("a UUID")))
        );
        assert_eq!(VolumeRef::parse("data"), Ok(VolumeRef::Name("data".into())));
        assert_eq!(VolumeRef::parse_optional(""), Ok(None));
        let status = tonic::Status::from(VolumeRef::parse("").expect_err("refused"));
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        assert!(
            status.message().starts_with("volume: "),
            "{}",
            status.message()
        );
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
        assert_eq!(admin.service[0].method.len(), 24);
    }
}
