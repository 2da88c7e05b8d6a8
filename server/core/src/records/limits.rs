//! Bounds on what the clients of a volume may ask of it.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::change::rewrite;
use super::{ConfigureError, Transaction, Versioned, VolumeRecord, VolumeState};

/// Smallest bound on requests a second: fewer, and the handful of requests it takes to mount a filesystem outlast the
/// patience of what waits for it.
const IOPS_MIN: u64 = 10;
/// Smallest bound on bytes a second: at this rate the largest request, 32 MiB, holds those behind it for 32 s.
const BYTES_PER_SECOND_MIN: u64 = 1 << 20;

/// Bounds of a volume; `None`: not bounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VolumeLimits {
    /// Requests a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Payload of reads and writes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
}

/// Bounds that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LimitsError {
    /// Too few requests.
    #[error("iops: at least {IOPS_MIN}, or 0 for no bound; not {0}")]
    Iops(u64),
    /// Too few bytes.
    #[error("bytes_per_second: at least {BYTES_PER_SECOND_MIN}, or 0 for no bound; not {0}")]
    Bytes(u64),
}

impl VolumeLimits {
    /// From numbers of which 0 means "not bounded".
    pub fn check(iops: u64, bytes_per_second: u64) -> Result<VolumeLimits, LimitsError> {
        match (iops, bytes_per_second) {
            (1..IOPS_MIN, _) => Err(LimitsError::Iops(iops)),
            (_, 1..BYTES_PER_SECOND_MIN) => Err(LimitsError::Bytes(bytes_per_second)),
            _ => Ok(VolumeLimits {
                iops: Some(iops).filter(|iops| *iops > 0),
                bytes_per_second: Some(bytes_per_second).filter(|bytes| *bytes > 0),
            }),
        }
    }

    /// Nothing is bounded.
    pub fn is_none(&self) -> bool {
        *self == VolumeLimits::default()
    }
}

/// Decides new limits, which need nobody to disconnect. `None`: nothing would change.
pub fn set_limits(
    current: &Versioned<VolumeRecord>,
    limits: VolumeLimits,
) -> Result<Option<(VolumeRecord, Transaction)>, ConfigureError> {
    if current.record.state == VolumeState::Deleting {
        return Err(ConfigureError::Deleting {
            name: current.record.name.clone(),
        });
    }
    if current.record.limits == limits {
        return Ok(None);
    }
    let limited = VolumeRecord {
        limits,
        ..current.record.clone()
    };
    let transaction = rewrite(current, &limited);
    Ok(Some((limited, transaction)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_no_bound_and_starvation_is_refused() {
        assert!(VolumeLimits::check(0, 0).expect("none").is_none());
        let some = VolumeLimits::check(10, 1 << 20).expect("smallest");
        assert_eq!(
            (some.iops, some.bytes_per_second),
            (Some(10), Some(1 << 20))
        );
        assert_eq!(VolumeLimits::check(9, 0), Err(LimitsError::Iops(9)));
        assert_eq!(VolumeLimits::check(0, 4096), Err(LimitsError::Bytes(4096)));
    }
}
