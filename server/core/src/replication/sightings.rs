//! Who was heard of, and when: by the clock of whoever looks, from nothing but that a record has changed. Clocks of two
//! nodes are never compared.

use std::collections::HashMap;
use std::hash::Hash;

use crate::records::Revision;

/// When each of them was last heard of.
#[derive(Clone, Debug)]
pub struct Sightings<K> {
    seen: HashMap<K, (Revision, u64)>,
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
        let seen = self.seen.entry(who).or_insert((changed_at, now_ms));
        if changed_at > seen.0 {
            *seen = (changed_at, now_ms);
        }
    }

    /// When it was last heard of. `None`: never.
    pub fn seen_at_ms(&self, who: K) -> Option<u64> {
        self.seen.get(&who).map(|(_, at_ms)| *at_ms)
    }

    /// Nothing was looked at for `ms`: that silence was the observer's own, and is held against nobody.
    pub fn forgive(&mut self, ms: u64) {
        for (_, at_ms) in self.seen.values_mut() {
            *at_ms += ms;
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
        // Several records of one node: the newest counts, in whatever order they are read.
        sightings.note("a", Revision(9), 1_000);
        sightings.note("a", Revision(8), 2_000);
        assert_eq!(sightings.seen_at_ms("a"), Some(1_000));
        sightings.forgive(500);
        assert_eq!(sightings.seen_at_ms("a"), Some(1_500));
    }
}
