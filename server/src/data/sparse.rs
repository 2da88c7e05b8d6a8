//! Log lines of what may come in thousands.

use std::time::{Duration, Instant};

/// Between two lines.
const PAUSE: Duration = Duration::from_secs(60);

/// Lets one of many things of a kind be told a minute, and counts the others.
#[derive(Debug, Default)]
pub(super) struct Sparse {
    told_at: Option<Instant>,
    held_back: u64,
}

impl Sparse {
    /// One more came. `Some`: it is to be told, with how many were not since the last one was.
    pub(super) fn tell(&mut self, now: Instant) -> Option<u64> {
        let is_early = self
            .told_at
            .is_some_and(|told_at| now.saturating_duration_since(told_at) < PAUSE);
        if is_early {
            self.held_back += 1;
            return None;
        }
        self.told_at = Some(now);
        Some(std::mem::take(&mut self.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_a_minute_is_told_and_none_is_forgotten() {
        let (mut sparse, start) = (Sparse::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(sparse.tell(at(0)), Some(0));
        assert_eq!(sparse.tell(at(1)), None);
        assert_eq!(sparse.tell(at(59)), None);
        assert_eq!(sparse.tell(at(60)), Some(2));
        assert_eq!(sparse.tell(at(61)), None);
        assert_eq!(sparse.tell(at(600)), Some(1));
    }
}
