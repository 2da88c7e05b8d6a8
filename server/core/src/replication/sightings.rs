//! Who was heard of, and when: by the clock of whoever looks, from nothing but that a record has changed. Clocks of two
//! nodes are never compared.

use std::collections::HashMap;
use std::hash::Hash;

use crate::records::Revision;

#[derive(Clone, Copy, Debug)]
struct Seen {
    changed_at: Revision,
    at_ms: u64,
    /// Not only found, but seen to change.
    has_changed: bool,
}

/// When each of them was last heard of.
#[derive(Clone, Debug)]
pub struct Sightings<K> {
    seen: HashMap<K, Seen>,
}

impl<K> Default for Sightings<K> {
    fn default() -> Sightings<K> {
        Sightings {
            seen: HashMap::new(),
        }
    }
}

impl<K: Eq + Hash + Copy> Sightings<K> {
    /// Its record was read. One that is read for the first time counts as just changed: nobody is given up by a look of
    /// a moment.
    pub fn note(&mut self, who: K, changed_at: Revision, now_ms: u64) {
        let found = Seen {
            changed_at,
            at_ms: now_ms,
            has_changed: false,
        };
        let seen = self.seen.entry(who).or_insert(found);
        if changed_at > seen.changed_at {
            *seen = Seen {
                has_changed: true,
                ..found
            };
        }
    }

    /// When it was last heard of. `None`: never.
    pub fn seen_at_ms(&self, who: K) -> Option<u64> {
        self.seen.get(&who).map(|seen| seen.at_ms)
    }

    /// Those whose records were seen to change, and when that was last.
    pub fn changed(&self) -> impl Iterator<Item = (K, u64)> {
        let all = self.seen.iter();
        all.filter(|(_, seen)| seen.has_changed)
            .map(|(who, seen)| (*who, seen.at_ms))
    }

    /// Nothing was looked at for `ms`: that silence was the observer's own, and is held against nobody.
    pub fn forgive(&mut self, ms: u64) {
        for seen in self.seen.values_mut() {
            seen.at_ms += ms;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_changed_record_is_a_sign_of_life() {
        let mut sightings = Sightings::default();
        assert_eq!(sightings.seen_at_ms("a"), None);
        sightings.note("a", Revision(7), 100);
        sightings.note("a", Revision(7), 900);
        assert_eq!(sightings.seen_at_ms("a"), Some(100));
        assert_eq!(sightings.changed().count(), 0);
        // Several records of one node: the newest counts, in whatever order they are read.
        sightings.note("a", Revision(9), 1_000);
        sightings.note("a", Revision(8), 2_000);
        assert_eq!(sightings.seen_at_ms("a"), Some(1_000));
        sightings.forgive(500);
        assert_eq!(sightings.seen_at_ms("a"), Some(1_500));
        assert_eq!(sightings.changed().collect::<Vec<_>>(), [("a", 1_500)]);
    }
}
