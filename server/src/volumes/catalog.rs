//! The volumes of this daemon in memory: what the metadata store holds, and what became of serving each.

use std::collections::BTreeMap;
use std::sync::Arc;

use ashlar_core::records::{Versioned, VolumeRecord, VolumeState};
use ashlar_core::units::{LayerId, VolumeId};

/// Whether a volume can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serving {
    /// Open in the data plane.
    Yes,
    /// Not open, for this reason.
    No(String),
}

/// One volume.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) current: Versioned<VolumeRecord>,
    pub(super) serving: Serving,
    /// Held by whoever changes the volume, across every await of the change.
    pub(super) changing: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Default)]
pub(super) struct Catalog {
    volumes: BTreeMap<VolumeId, Entry>,
    /// Active volumes only: the name of a tombstone is free.
    names: BTreeMap<String, VolumeId>,
}

impl Entry {
    /// It never falls: a head may know of a larger one before the record that says so was read.
    fn raise_generation(&mut self, to: u64) {
        let generation = &mut self.current.record.client_generation;
        *generation = (*generation).max(to);
    }
}

impl Catalog {
    /// A head says of which generation a volume's clients are.
    pub(super) fn raise_generation(&mut self, id: VolumeId, to: u64) {
        if let Some(known) = self.volumes.get_mut(&id) {
            known.raise_generation(to);
        }
    }

    /// Adds a volume or replaces what is known of it.
    pub(super) fn put(&mut self, current: Versioned<VolumeRecord>, serving: Serving) {
        let id = current.record.id;
        if let Some(known) = self.volumes.get(&id) {
            let name = known.current.record.name.as_str();
            if self.names.get(name) == Some(&id) {
                self.names.remove(name);
            }
        }
        if current.record.state == VolumeState::Active {
            self.names.insert(current.record.name.to_string(), id);
        }
        match self.volumes.get_mut(&id) {
            Some(known) => {
                let generation = known.current.record.client_generation;
                known.current = current;
                known.raise_generation(generation);
                known.serving = serving;
            }
            None => {
                self.volumes.insert(
                    id,
                    Entry {
                        current,
                        serving,
                        changing: Arc::default(),
                    },
                );
            }
        }
    }

    pub(super) fn remove(&mut self, id: VolumeId) {
        if let Some(entry) = self.volumes.remove(&id)
            && self.names.get(entry.current.record.name.as_str()) == Some(&id)
        {
            self.names.remove(entry.current.record.name.as_str());
        }
    }

    pub(super) fn get(&self, id: VolumeId) -> Option<&Entry> {
        self.volumes.get(&id)
    }

    /// By name, or by id in any of a UUID's forms. A name can have none of those forms.
    pub(super) fn find(&self, reference: &str) -> Option<&Entry> {
        let id = match uuid::Uuid::try_parse(reference) {
            Ok(id) => VolumeId(id),
            Err(_) => *self.names.get(reference)?,
        };
        self.volumes.get(&id)
    }

    /// Ordered by name; volumes of one name (a tombstone and its successor) by id.
    pub(super) fn all(&self) -> Vec<Entry> {
        let mut all: Vec<_> = self.volumes.values().cloned().collect();
        all.sort_by(|a, b| a.current.record.name.cmp(&b.current.record.name));
        all
    }

    pub(super) fn layers(&self) -> impl Iterator<Item = LayerId> + '_ {
        self.volumes
            .values()
            .flat_map(|entry| entry.current.record.layers.iter().copied())
    }

    /// Every name leads to an active volume of that name, and every active volume is found by its name.
    #[cfg(test)]
    pub(super) fn check_invariants(&self) {
        for (name, id) in &self.names {
            let record = &self.volumes[id].current.record;
            assert_eq!(
                (record.name.as_str(), record.state),
                (name.as_str(), VolumeState::Active)
            );
        }
        let active = self
            .volumes
            .values()
            .filter(|entry| entry.current.record.state == VolumeState::Active);
        assert_eq!(active.count(), self.names.len());
    }
}
