//! What a client was told, and what every block may therefore hold.

use std::collections::BTreeMap;

use ashlar_core::store::ExtentKey;
use ashlar_core::units::BLOCK_BYTES;

/// A block of a layer.
pub(crate) type Place = (ExtentKey, u32);

#[derive(Clone, Debug, Default)]
struct History {
    /// Versions in order since the last crash; zero content is `true`.
    writes: Vec<(u64, bool)>,
    /// Nothing before this one may be found after a crash: it was flushed, or read after the last one.
    floor: usize,
    /// Writes from here on were taken but never answered.
    unanswered: bool,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Oracle {
    blocks: BTreeMap<Place, History>,
}

/// Fills `block` with what version `version` of `place` looks like, sector by sector.
pub(crate) fn fill(block: &mut [u8], place: Place, version: u64) {
    for (i, sector) in block.chunks_exact_mut(512).enumerate() {
        let mut word = [0u8; 32];
        word[..8].copy_from_slice(&version.to_le_bytes());
        word[8..16].copy_from_slice(&place.0.layer.0.to_le_bytes());
        word[16..20].copy_from_slice(&place.0.chunk.0.to_le_bytes());
        word[20..24].copy_from_slice(&place.1.to_le_bytes());
        word[24] = i as u8;
        for piece in sector.chunks_exact_mut(32) {
            piece.copy_from_slice(&word);
        }
    }
}

fn content(block: &[u8], place: Place) -> Result<Option<u64>, String> {
    if block.iter().all(|&b| b == 0) {
        return Ok(None);
    }
    let version = u64::from_le_bytes(block[..8].try_into().expect("8 bytes"));
    let mut want = [0; BLOCK_BYTES];
    fill(&mut want, place, version);
    if block != want {
        return Err(format!(
            "{place:?}: torn or foreign content (says version {version})"
        ));
    }
    Ok(Some(version))
}

impl Oracle {
    pub(crate) fn places(&self) -> Vec<Place> {
        self.blocks.keys().copied().collect()
    }

    fn history(&mut self, place: Place) -> &mut History {
        self.blocks.entry(place).or_insert_with(|| History {
            writes: vec![(0, true)],
            floor: 0,
            unanswered: false,
        })
    }

    pub(crate) fn wrote(&mut self, place: Place, version: u64, zero: bool, answered: bool) {
        let h = self.history(place);
        h.writes.push((version, zero));
        h.unanswered = !answered;
    }

    /// How many writes each block has: what a read issued now may not go behind, and what a flush covers.
    pub(crate) fn mark(&self, place: Place) -> u64 {
        self.blocks
            .get(&place)
            .map_or(0, |h| h.writes.last().expect("never empty").0)
    }

    /// Everything written when `marks` were taken is on stable storage.
    pub(crate) fn flushed(&mut self, marks: &[(Place, u64)]) {
        for &(place, version) in marks {
            if let Some(h) = self.blocks.get_mut(&place) {
                let flushed = h.writes.iter().position(|w| w.0 == version).unwrap_or(0);
                h.floor = h.floor.max(flushed);
            }
        }
    }

    pub(crate) fn marks(&self) -> Vec<(Place, u64)> {
        // A write that was not answered is not covered by a flush.
        self.blocks
            .iter()
            .map(|(p, h)| {
                let n = h.writes.len();
                (
                    *p,
                    if h.unanswered && n > 1 {
                        h.writes[n - 2].0
                    } else {
                        h.writes[n - 1].0
                    },
                )
            })
            .collect()
    }

    /// A read that began when the newest write was `since` saw `block`.
    pub(crate) fn read(&self, place: Place, since: u64, block: &[u8]) -> Result<(), String> {
        let seen = content(block, place)?;
        let Some(h) = self.blocks.get(&place) else {
            return if seen.is_none() {
                Ok(())
            } else {
                Err(format!("{place:?}: {seen:?} was never written"))
            };
        };
        let ok = h.writes.iter().any(|&(v, zero)| {
            v >= since
                && if zero {
                    seen.is_none()
                } else {
                    seen == Some(v)
                }
        });
        if ok {
            Ok(())
        } else {
            Err(format!(
                "{place:?}: read {seen:?}, which is older than {since}; {:?}",
                h.writes
            ))
        }
    }

    /// After a crash `block` was found: it must lie between the floor and the newest, and is the floor from now on.
    /// After the death of the process alone nothing answered may be missing.
    pub(crate) fn recovered(
        &mut self,
        place: Place,
        block: &[u8],
        power: bool,
    ) -> Result<(), String> {
        let seen = content(block, place)?;
        let h = self.history(place);
        let n = h.writes.len();
        let from = match (power, h.unanswered) {
            (true, _) => h.floor,
            (false, true) => n.saturating_sub(2).max(h.floor),
            (false, false) => n - 1,
        };
        let found = (from..n).find(|&i| {
            let (v, zero) = h.writes[i];
            if zero {
                seen.is_none()
            } else {
                seen == Some(v)
            }
        });
        match found {
            Some(i) => {
                h.writes = vec![h.writes[i]];
                h.floor = 0;
                h.unanswered = false;
                Ok(())
            }
            None => Err(format!(
                "{place:?}: found {seen:?}, may be {:?} (power cut: {power})",
                &h.writes[from..]
            )),
        }
    }

    pub(crate) fn forget_layer(&mut self, layer: u64) {
        self.blocks.retain(|(key, _), _| key.layer.0 != layer);
    }
}
