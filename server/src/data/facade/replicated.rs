//! Replicated volumes: what the control plane tells the data threads, and what they tell it.

use ashlar_core::records::{LeftoverRecord, Versioned, VolumeRecord};
use ashlar_core::replication::SwapOutcome;
use ashlar_core::units::{ChunkIndex, LayerId, StoreId, VolumeId};

use super::{DataPlane, lock};
use crate::data::cluster::{ClusterCommand, ClusterTell, LinkEnds, ReplicatedSpec};
use crate::data::command::Command;
use crate::data::config::DataError;

impl DataPlane {
    /// Begins to claim a replicated volume and to serve it; it is served when [`ClusterTell::Serving`] says so.
    pub async fn open_replicated(&self, spec: ReplicatedSpec) -> Result<(), DataError> {
        let record = &spec.record.record;
        let id = record.id;
        // Where most of its copies in this daemon are; all of them must be on one thread, or none is used.
        let sets = record.placement.sets.iter();
        let mut here = sets
            .flat_map(|set| set.replicas.iter())
            .filter_map(|replica| self.0.stores.iter().find(|store| store.id == replica.store))
            .map(|store| store.thread);
        let thread = here.next().unwrap_or(0);
        if here.any(|other| other != thread) {
            return Err(DataError::StoresApart);
        }
        // Before the head is there: the outcome of its first swap must find it, and may be quicker than the answer. It
        // stays when the head has ended, of which the thread knows best.
        lock(&self.0.volumes).insert(id, thread);
        self.0.threads[thread]
            .ask(|answer| Command::Cluster(ClusterCommand::Open(Box::new(spec), answer)))
            .await?
    }

    /// Takes no work for replicas of a volume any more, whoever sends it.
    pub async fn forget_replicas(&self, volume: VolumeId) {
        for thread in &self.0.threads {
            let forget = |answer| Command::Cluster(ClusterCommand::Forget { volume, answer });
            // A thread that has ended takes no work.
            let _ = thread.ask(forget).await;
        }
    }

    /// Gives some of what a store has of a set that went elsewhere back: of one layer, from a chunk on. Answers where to go
    /// on; `None`: nothing is left of it. Durable at the store's next checkpoint.
    pub async fn give_back(
        &self,
        left: &LeftoverRecord,
        layer: LayerId,
        from: ChunkIndex,
    ) -> Result<Option<ChunkIndex>, DataError> {
        let command = |answer| {
            let left = left.clone();
            Command::Cluster(ClusterCommand::GiveBack {
                left,
                layer,
                from,
                answer,
            })
        };
        self.thread_of_store(left.store)?.ask(command).await?
    }

    /// What data threads ask for replicated volumes. `None`: the threads have ended.
    pub async fn cluster_tell(&self) -> Option<ClusterTell> {
        self.0.cluster_tells.lock().await.recv().await
    }

    /// A volume's record: the answer to [`ClusterTell::ReadRecord`] (`asked`), or what a watch saw.
    pub fn record_read(
        &self,
        volume: VolumeId,
        asked: bool,
        record: Option<Versioned<VolumeRecord>>,
    ) {
        let record = record.map(Box::new);
        self.tell_volume(
            volume,
            ClusterCommand::Record {
                volume,
                asked,
                record,
            },
        );
    }

    /// [`ClusterTell::Swap`] ended.
    pub fn swapped(&self, volume: VolumeId, serial: u64, outcome: SwapOutcome) {
        self.tell_volume(
            volume,
            ClusterCommand::Swapped {
                volume,
                serial,
                outcome,
            },
        );
    }

    fn tell_volume(&self, volume: VolumeId, command: ClusterCommand) {
        if let Ok(thread) = self.thread_of(volume) {
            // A thread that has ended has no head.
            let _ = thread.send(Command::Cluster(command));
        }
    }

    /// [`ClusterTell::Persist`] is durable.
    pub fn persisted(&self, volume: VolumeId, store: StoreId, serial: u64) {
        if let Ok(thread) = self.thread_of_store(store) {
            let _ = thread.send(Command::Cluster(ClusterCommand::Persisted {
                volume,
                store,
                serial,
            }));
        }
    }

    /// A link that a thread wished for is up.
    pub fn link_up(&self, thread: usize, ends: LinkEnds) {
        if let Some(thread) = self.0.threads.get(thread) {
            let _ = thread.send(Command::Cluster(ClusterCommand::LinkUp(Box::new(ends))));
        }
    }

    /// A head of a peer wants to reach one of this daemon's stores.
    pub fn link_accepted(&self, ends: LinkEnds) -> Result<(), DataError> {
        let thread = self.thread_of_store(ends.peer.store)?;
        thread.send(Command::Cluster(ClusterCommand::LinkAccepted(Box::new(
            ends,
        ))))
    }
}
