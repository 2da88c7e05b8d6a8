//! Volume sizes: whole blocks, bounded.

use thiserror::Error;

use crate::units::BLOCK_BYTES;

/// Largest volume: 1 PiB. Far inside what a chunk index can name (2^32 chunks of 64 MiB); the bound keeps the
/// directory of one fully written volume (about 12 MiB a TiB) within the memory of a large machine.
pub const VOLUME_MAX_BYTES: u64 = 1 << 50;

/// A size in whole blocks, and whether the asked size had to be raised to get there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundedSize {
    /// A multiple of a block, at least one block, at most [`VOLUME_MAX_BYTES`].
    pub bytes: u64,
    /// What was asked for, in bytes.
    pub asked_bytes: u64,
}

impl RoundedSize {
    /// True when the asked size was not a multiple of a block; whoever asked must be told.
    pub fn was_rounded(&self) -> bool {
        self.bytes != self.asked_bytes
    }
}

/// Why a size is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SizeError {
    /// Zero bytes.
    #[error("a volume must have a size; give one such as 10GiB")]
    Zero,
    /// Above [`VOLUME_MAX_BYTES`].
    #[error("{asked_bytes} bytes is more than a volume can have ({VOLUME_MAX_BYTES} bytes, 1 PiB)")]
    TooLarge {
        /// What was asked for, in bytes.
        asked_bytes: u64,
    },
}

/// Rounds `asked_bytes` up to a whole number of blocks.
pub fn round_up_to_block(asked_bytes: u64) -> Result<RoundedSize, SizeError> {
    if asked_bytes == 0 {
        return Err(SizeError::Zero);
    }
    if asked_bytes > VOLUME_MAX_BYTES {
        return Err(SizeError::TooLarge { asked_bytes });
    }
    Ok(RoundedSize {
        bytes: asked_bytes.next_multiple_of(BLOCK_BYTES as u64),
        asked_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_up_and_says_so() {
        for (asked, bytes) in [
            (1, 4096),
            (4095, 4096),
            (4096, 4096),
            (4097, 8192),
            (VOLUME_MAX_BYTES, VOLUME_MAX_BYTES),
        ] {
            let size = round_up_to_block(asked).expect("in range");
            assert_eq!(size.bytes, bytes);
            assert_eq!(size.was_rounded(), asked != bytes);
        }
    }

    #[test]
    fn refuses_nothing_and_too_much() {
        assert_eq!(round_up_to_block(0), Err(SizeError::Zero));
        for asked_bytes in [VOLUME_MAX_BYTES + 1, u64::MAX] {
            assert_eq!(
                round_up_to_block(asked_bytes),
                Err(SizeError::TooLarge { asked_bytes })
            );
        }
    }
}
