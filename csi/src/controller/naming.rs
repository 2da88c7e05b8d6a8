//! From an orchestrator's names to the daemon's.
//!
//! An orchestrator may name a volume with 128 bytes of any Unicode; the daemon's names have 63 characters of a small
//! alphabet. A name that fits is kept, so that people find their volumes; any other becomes `csi-` and a hash of it. No
//! two names meet: what itself looks like such a hash is hashed too.

use std::fmt::Write;

use sha2::{Digest, Sha256};
use uuid::Uuid;

const NAME_MAX: usize = 63;
const HASHED: &str = "csi-";
/// Hex digits of the hash that are kept: 160 bits.
const DIGITS: usize = 40;

/// The daemon's name for a volume that is called `name`.
pub fn volume_name(name: &str) -> String {
    if is_plain(name) && !is_hashed(name) {
        return name.to_owned();
    }
    let mut hashed = String::from(HASHED);
    for byte in Sha256::digest(name.as_bytes()).iter().take(DIGITS / 2) {
        let _ = write!(hashed, "{byte:02x}");
    }
    hashed
}

fn is_hashed(name: &str) -> bool {
    name.strip_prefix(HASHED).is_some_and(|digits| {
        digits.len() == DIGITS && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

/// The daemon's rule for names.
fn is_plain(name: &str) -> bool {
    let edge = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let inner = |byte: u8| edge(&byte) || b"-_.".contains(&byte);
    let bytes = name.as_bytes();
    bytes.len() <= NAME_MAX
        && bytes.first().is_some_and(edge)
        && bytes.last().is_some_and(edge)
        && bytes.iter().copied().all(inner)
        && Uuid::try_parse(name).is_err()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_that_fit_stay_and_others_become_hashes() {
        let kept = "pvc-0d3b8ad0-1a39-4c04-b86b-a0a3c1f0a1b2";
        assert_eq!(volume_name(kept), kept);
        let long = "n".repeat(128);
        let odd = [
            long.as_str(),
            "Sanity-Upper",
            "-edge",
            "a b",
            "é",
            "a/../b",
            "0d3b8ad0-1a39-4c04-b86b-a0a3c1f0a1b2",
        ];
        let mut seen = HashSet::new();
        for name in odd {
            let given = volume_name(name);
            assert!(
                is_plain(&given) && given.starts_with(HASHED),
                "{name}: {given}"
            );
            assert!(seen.insert(given.clone()), "{name} meets another");
            // Nobody can take another's place by calling a volume what its hash is.
            assert_ne!(volume_name(&given), given);
        }
    }
}
