//! Which size a volume gets.

use crate::refusal::{Class, Refusal};

/// What the daemon rounds to.
pub const BLOCK_BYTES: u64 = 4096;
/// The size of a volume whose caller leaves it open.
pub const DEFAULT_BYTES: u64 = 1 << 30;
/// The smallest volume that is made.
pub const MINIMUM_BYTES: u64 = 1 << 20;

/// A wanted size: at least, at most; 0 is not given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// At least.
    pub required_bytes: u64,
    /// At most.
    pub limit_bytes: u64,
}

impl Range {
    /// Checks a range as it comes from the wire.
    pub fn parse(required_bytes: i64, limit_bytes: i64) -> Result<Range, Refusal> {
        let number = |value: i64, what: &str| {
            u64::try_from(value).map_err(|_| Refusal::invalid(format!("{what} is negative")))
        };
        let range = Range {
            required_bytes: number(required_bytes, "required_bytes")?,
            limit_bytes: number(limit_bytes, "limit_bytes")?,
        };
        if range.limit_bytes != 0 && range.limit_bytes < range.required_bytes {
            return Err(Refusal::invalid(
                "limit_bytes is smaller than required_bytes",
            ));
        }
        Ok(range)
    }

    /// Whether a volume of this size is what was asked for.
    pub fn allows(self, size_bytes: u64) -> bool {
        size_bytes >= self.required_bytes
            && (self.limit_bytes == 0 || size_bytes <= self.limit_bytes)
    }
}

/// The size of a new volume, at least `minimum_bytes` and at most `maximum_bytes`.
pub fn chosen(range: Range, minimum_bytes: u64, maximum_bytes: u64) -> Result<u64, Refusal> {
    let minimum = minimum_bytes.max(MINIMUM_BYTES);
    let wanted = match (range.required_bytes, range.limit_bytes) {
        (0, 0) => DEFAULT_BYTES,
        // Only a bound above: as much as the default, where it fits.
        (0, limit) => DEFAULT_BYTES.min(limit / BLOCK_BYTES * BLOCK_BYTES),
        (required, _) => required,
    };
    let size = wanted.max(minimum).checked_next_multiple_of(BLOCK_BYTES);
    match size {
        Some(size) if range.allows(size) && size <= maximum_bytes => Ok(size),
        _ => Err(Refusal::new(
            Class::OutOfRange,
            format!(
                "a volume has at least {minimum} and at most {maximum_bytes} bytes, in steps of {BLOCK_BYTES}; \
                 asked for were {} to {}",
                range.required_bytes,
                if range.limit_bytes == 0 {
                    "any number".to_owned()
                } else {
                    range.limit_bytes.to_string()
                }
            ),
        )),
    }
}

/// The size of a volume of `present` bytes after it was expanded to a range. Never smaller than it is.
pub fn grown(present: u64, range: Range) -> Result<u64, Refusal> {
    if range.required_bytes == 0 && range.limit_bytes == 0 {
        return Err(Refusal::invalid("no size is given"));
    }
    let out_of_range = |message: String| Refusal::new(Class::OutOfRange, message);
    let wanted = range
        .required_bytes
        .checked_next_multiple_of(BLOCK_BYTES)
        .ok_or_else(|| out_of_range("there is no such size".to_owned()))?
        .max(present);
    if range.limit_bytes != 0 && wanted > range.limit_bytes {
        return Err(out_of_range(format!(
            "the volume has {present} bytes and would need {wanted}, more than the limit of {}",
            range.limit_bytes
        )));
    }
    Ok(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: u64 = 1 << 50;

    fn range(required_bytes: u64, limit_bytes: u64) -> Range {
        Range {
            required_bytes,
            limit_bytes,
        }
    }

    #[test]
    fn ranges_are_checked() {
        assert_eq!(Range::parse(5, 0), Ok(range(5, 0)));
        for (required, limit) in [(-1, 0), (0, -1), (5, 4)] {
            let refused = Range::parse(required, limit).expect_err("refused");
            assert_eq!(refused.class, Class::InvalidArgument);
        }
    }

    #[test]
    fn new_volumes_get_a_size_within_their_range() {
        assert_eq!(chosen(range(0, 0), 0, MAX), Ok(DEFAULT_BYTES));
        assert_eq!(chosen(range(1, 0), 0, MAX), Ok(MINIMUM_BYTES));
        assert_eq!(chosen(range(1, 0), 300 << 20, MAX), Ok(300 << 20));
        assert_eq!(
            chosen(range((1 << 30) + 1, 0), 0, MAX),
            Ok((1 << 30) + 4096)
        );
        assert_eq!(chosen(range(0, (2 << 20) + 17), 0, MAX), Ok(2 << 20));
        for impossible in [
            chosen(range(0, 4096), 0, MAX),
            chosen(range((1 << 30) + 1, (1 << 30) + 2), 0, MAX),
            chosen(range(1, 1 << 20), 300 << 20, MAX),
            chosen(range(MAX + 1, 0), 0, MAX),
            chosen(range(u64::MAX, 0), 0, MAX),
        ] {
            assert_eq!(impossible.expect_err("impossible").class, Class::OutOfRange);
        }
    }

    #[test]
    fn volumes_only_grow() {
        assert_eq!(grown(8192, range(4096, 0)), Ok(8192));
        assert_eq!(grown(8192, range(8193, 0)), Ok(12288));
        assert_eq!(grown(8192, range(0, 8192)), Ok(8192));
        assert_eq!(
            grown(8192, range(0, 4096)).expect_err("small").class,
            Class::OutOfRange
        );
        assert_eq!(
            grown(4096, range(4097, 5000)).expect_err("odd").class,
            Class::OutOfRange
        );
        assert_eq!(
            grown(4096, range(u64::MAX, 0)).expect_err("vast").class,
            Class::OutOfRange
        );
        assert_eq!(
            grown(1, range(0, 0)).expect_err("none").class,
            Class::InvalidArgument
        );
    }
}
