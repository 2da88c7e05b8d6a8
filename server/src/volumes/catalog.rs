//! The volumes of this daemon in memory: what the metadata store holds, and what became of serving each.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use ashlar_core::records::{Versioned, VolumeRecord, VolumeState};
use ashlar_core::units::{LayerId, NodeId, VolumeId};
use uuid::Uuid;

/// Whether a volume can be reached here. Its text says why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serving {
    /// Open in the data plane.
    Yes,
    /// About to be opened for the first time.
    Opening,
    /// A head here claims it and makes its replicas alike; that one tells what comes of it.
    Sealing,
    /// Its head is at another node, or nowhere.
    Elsewhere(Option<NodeId>),
    /// Not open, for this reason.
    No(String),
}

impl Serving {
    /// Why it cannot be reached; `None`: it can.
    pub fn reason(&self) -> Option<String> {
        (*self != Serving::Yes).then(|| self.to_string())
    }

    /// Of a volume that no head here has.
    pub(super) fn elsewhere(record: &VolumeRecord) -> Serving {
        Serving::Elsewhere(record.head.map(|head| head.node))
    }
}

impl fmt::Display for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Serving::Yes => f.write_str("it is served"),
            Serving::Opening => f.write_str("it is being opened"),
            Serving::Sealing => f.write_str("its replicas are being sealed"),
            Serving::Elsewhere(Some(node)) => write!(f, "node {} serves it", node.0),
            Serving::Elsewhere(None) => {
                f.write_str("no node serves it; open it with `ashlar volume open`")
            }
            Serving::No(reason) => f.write_str(reason),
        }
    }
}

/// One volume.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) current: Versioned<VolumeRecord>,
    pub(super) serving: Serving,
    /// The head of replicas that was opened here last, by the incarnation of its claim. What an earlier one tells, which may
    /// come late, is not of what is served now.
    pub(super) head: Option<Uuid>,
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
                        head: None,
                        changing: Arc::default(),
                    },
                );
            }
        }
    }

    /// From here on the head of this incarnation tells how the volume is served.
    pub(super) fn begin_sealing(&mut self, current: Versioned<VolumeRecord>, incarnation: Uuid) {
        let id = current.record.id;
        self.put(current, Serving::Sealing);
        if let Some(entry) = self.volumes.get_mut(&id) {
            entry.head = Some(incarnation);
        }
    }

    /// The head of this incarnation could not begin; `before` is the one that was there, which may still be at its end.
    pub(super) fn sealing_failed(
        &mut self,
        id: VolumeId,
        incarnation: Uuid,
        serving: Serving,
        before: Option<Uuid>,
    ) {
        if self.told(id, incarnation, serving)
            && let Some(entry) = self.volumes.get_mut(&id)
        {
            entry.head = before;
        }
    }

    /// A head of this volume tells how it is served. False: it is not the one that was opened last.
    pub(super) fn told(&mut self, id: VolumeId, incarnation: Uuid, serving: Serving) -> bool {
        match self.volumes.get_mut(&id) {
            Some(entry) if entry.head == Some(incarnation) => {
                entry.serving = serving;
                true
            }
            _ => false,
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

#[cfg(test)]
mod tests {
    use ashlar_core::records::{Placement, Revision, VolumeName};

    use super::*;

    fn volume() -> Versioned<VolumeRecord> {
        Versioned {
            record: VolumeRecord::new(
                VolumeId(Uuid::from_u128(1)),
                VolumeName::parse("db").expect("name"),
                8192,
                LayerId(3),
                Placement::default(),
            ),
            changed_at: Revision(1),
        }
    }

    /// The end of a head is told through a queue: another one of this daemon may have begun meanwhile.
    #[test]
    fn what_an_earlier_head_tells_does_not_count() {
        let (mut catalog, volume) = (Catalog::default(), volume());
        let id = volume.record.id;
        let (first, second) = (Uuid::from_u128(11), Uuid::from_u128(12));
        let closed = || Serving::No("it was closed".to_owned());
        catalog.put(volume.clone(), Serving::Opening);
        assert!(!catalog.told(id, first, Serving::Yes), "nobody has it yet");
        catalog.begin_sealing(volume.clone(), first);
        assert!(catalog.told(id, first, Serving::Yes));
        catalog.begin_sealing(volume, second);
        for late in [Serving::Yes, closed()] {
            assert!(!catalog.told(id, first, late));
            assert_eq!(catalog.get(id).expect("there").serving, Serving::Sealing);
        }
        assert!(catalog.told(id, second, Serving::Yes));
        assert!(!catalog.told(id, first, closed()));
        assert_eq!(catalog.get(id).expect("there").serving, Serving::Yes);
        assert!(catalog.told(id, second, closed()));
        catalog.check_invariants();
    }
}
