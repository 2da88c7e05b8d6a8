//! The controller of a cluster: which copies there should be is decided in `ashlar_core::replication::controller`; here
//! the records are read, the changes are carried out, and somebody is found to do it.
//!
//! Every daemon looks at the same records and keeps a [`Picture`] for people. The one that holds the leader record also
//! carries out what is wanted. Each gives back what its own stores have left of sets that went elsewhere.

mod leftovers;
mod look;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ashlar_core::records::{
    MemberRecord, MemberState, SetIndex, Versioned, VolumeRecord, keys, lead,
};
use ashlar_core::replication::controller::{ControllerParams, Wanted};
use ashlar_core::replication::membership::{self, Change};
use ashlar_core::units::{NodeId, StoreId, VolumeId};
use tokio::sync::watch;
use uuid::Uuid;

use crate::data::DataPlane;
use crate::meta::{self, MetadataError, MetadataStore, Outcome};
use crate::replication::Dial;
use crate::volumes::Volumes;
use look::{Look, Looks};

/// Between two looks at the records.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// A leader whose record was not renewed for so long is replaced.
const LEADER_SILENT: Duration = Duration::from_secs(15);
/// A set that was moved to spread the load stays where it is for so long.
const MOVED_FOR: Duration = Duration::from_secs(24 * 3600);
/// Changes of one volume in one transaction: each may be two of its steps.
const CHANGES_AT_ONCE: usize = 32;
/// A volume that could not be opened is not tried again for so long.
const OPEN_AGAIN: Duration = Duration::from_secs(30);

/// A node, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodePicture {
    /// How long it has not been heard of.
    pub silent: Duration,
    /// So long that it gets nothing new.
    pub is_away: bool,
    /// Blocks of its stores that clients may fill.
    pub capacity_blocks: u64,
    /// Of those, the ones in use.
    pub used_blocks: u64,
    /// Sets that it has yet to give back the blocks of.
    pub leftovers: usize,
}

/// A cluster as this daemon saw it last, for people.
#[derive(Clone, Debug, Default)]
pub struct Picture {
    /// Who runs the controller.
    pub leader: Option<NodeId>,
    /// It is this daemon.
    pub is_leader: bool,
    /// Those that were heard of.
    pub nodes: BTreeMap<NodeId, NodePicture>,
    /// Nodes that are being emptied.
    pub draining: Vec<NodeId>,
    /// Sets for which there is no node that could take another replica.
    pub stuck: Vec<(VolumeId, SetIndex)>,
    /// Changes of replicas that this daemon made as the leader.
    pub changes: u64,
}

/// The controller of one daemon.
pub struct Controller {
    records: Arc<dyn MetadataStore>,
    volumes: Arc<Volumes>,
    plane: DataPlane,
    dial: Arc<dyn Dial>,
    node: NodeId,
    incarnation: Uuid,
    params: ControllerParams,
    started: Instant,
    picture: Mutex<Arc<Picture>>,
}

/// What the leader remembers.
#[derive(Default)]
struct Memory {
    moved: Vec<(VolumeId, SetIndex, Instant)>,
    /// Which stores there were: with others, other moves make sense.
    stores: Vec<StoreId>,
    opening: Option<tokio::task::JoinHandle<()>>,
    tried: BTreeMap<VolumeId, Instant>,
    /// Volumes that were never served, since they were first seen: one that was just created is about to be.
    headless: BTreeMap<VolumeId, Instant>,
    changes: u64,
}

impl Controller {
    /// Works until told to stop.
    pub fn start(
        records: Arc<dyn MetadataStore>,
        volumes: Arc<Volumes>,
        plane: DataPlane,
        dial: Arc<dyn Dial>,
        node: NodeId,
        replace_after: Duration,
        stop: watch::Receiver<bool>,
    ) -> Arc<Controller> {
        let mut params = ControllerParams {
            grace_ms: replace_after.as_millis() as u64,
            ..ControllerParams::default()
        };
        params.silent_ms = params.silent_ms.min(params.grace_ms);
        let controller = Arc::new(Controller {
            records,
            volumes,
            plane,
            dial,
            node,
            incarnation: Uuid::new_v4(),
            params,
            started: Instant::now(),
            picture: Mutex::default(),
        });
        tokio::spawn(leftovers::give_back(controller.clone(), stop.clone()));
        tokio::spawn(controller.clone().run(stop));
        controller
    }

    /// The cluster as it was seen last.
    pub fn picture(&self) -> Arc<Picture> {
        let picture = self.picture.lock();
        picture.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    async fn run(self: Arc<Controller>, mut stop: watch::Receiver<bool>) {
        let mut looks = Looks::default();
        let mut memory = Memory::default();
        loop {
            if let Err(error) = self.look_once(&mut looks, &mut memory).await {
                tracing::debug!(%error, "the controller cannot look at the cluster");
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }

    async fn look_once(
        self: &Arc<Controller>,
        looks: &mut Looks,
        memory: &mut Memory,
    ) -> Result<(), MetadataError> {
        let read = Look::read(&*self.records).await?;
        // After the reading: an answer that came late shows nobody more silent than it is.
        let now_ms = self.now_ms();
        looks.note(&read, now_ms, LOOK_EVERY.as_millis() as u64);
        let current = self.volumes.records();
        let volumes: Vec<VolumeRecord> = current.iter().map(|v| v.record.clone()).collect();
        memory.moved.retain(|(.., at)| at.elapsed() < MOVED_FOR);
        let stores = looks.stores_there(&read, now_ms, self.params.silent_ms);
        if memory.stores != stores {
            memory.stores = stores;
            memory.moved.clear();
        }
        let moved: Vec<_> = memory.moved.iter().map(|(v, set, _)| (*v, *set)).collect();
        let wanted = looks.wanted(&self.params, &read, now_ms, &volumes, &moved);

        let leader = read.leader.as_ref();
        let is_silent = looks.leader_is_silent(now_ms, LEADER_SILENT.as_millis() as u64);
        let is_leader = match lead(leader, self.node, self.incarnation, is_silent) {
            None => false,
            Some(claim) => {
                // One whose outcome is not known is looked up in the next round.
                let claimed = self.records.commit(claim).await;
                matches!(claimed, Ok(Outcome::Committed(_)))
            }
        };
        let was = self.picture().is_leader;
        if is_leader && !was {
            tracing::info!("this node runs the controller of the cluster");
        } else if was && !is_leader {
            tracing::info!("this node no longer runs the controller of the cluster");
        }
        self.volumes
            .set_heard(looks.heard(now_ms, self.params.silent_ms));
        if is_leader {
            self.carry_out(&read.members, &current, &wanted, memory)
                .await;
            self.open_unserved(&read, &current, &wanted, memory);
        }
        let mut picture = looks.picture(&self.params, &read, now_ms, &wanted);
        picture.is_leader = is_leader;
        picture.changes = memory.changes;
        if is_leader {
            picture.leader = Some(self.node);
        }
        let picture = Arc::new(picture);
        *self.picture.lock().unwrap_or_else(PoisonError::into_inner) = picture;
        Ok(())
    }

    /// Makes the changes, those of one volume together. What has changed meanwhile is decided afresh in the next round.
    async fn carry_out(
        &self,
        members: &[Versioned<MemberRecord>],
        current: &[Versioned<VolumeRecord>],
        wanted: &Wanted,
        memory: &mut Memory,
    ) {
        for volume in current {
            let changes = wanted
                .changes
                .iter()
                .filter(|(id, _)| *id == volume.record.id)
                .map(|(_, change)| *change)
                .take(CHANGES_AT_ONCE);
            let changes: Vec<Change> = changes.collect();
            if changes.is_empty() {
                continue;
            }
            let (_, mut transaction) = match membership::change_all(volume, &changes) {
                Ok(decided) => decided,
                Err(error) => {
                    tracing::debug!(volume = %volume.record.name, %error, "replicas are not changed");
                    continue;
                }
            };
            // A node that is being emptied or shut out meanwhile gets nothing.
            let mut targets: Vec<NodeId> = changes.iter().filter_map(target).collect();
            targets.sort_unstable();
            targets.dedup();
            let found: Vec<_> = members
                .iter()
                .filter(|member| targets.contains(&member.record.id))
                .collect();
            let is_fit = |member: &&Versioned<MemberRecord>| {
                member.record.state == MemberState::Active && !member.record.draining
            };
            if found.len() != targets.len() || !found.iter().all(is_fit) {
                continue;
            }
            for member in found {
                transaction =
                    transaction.when_unchanged(keys::member(member.record.id), member.changed_at);
            }
            match self.records.commit(transaction).await {
                Ok(Outcome::Committed(_)) => {
                    memory.changes += changes.len() as u64;
                    for change in &changes {
                        self.log(&volume.record, change);
                    }
                    let spread = wanted
                        .spread
                        .iter()
                        .filter(|(id, _)| *id == volume.record.id);
                    let spread = spread.map(|(id, set)| (*id, *set, Instant::now()));
                    memory.moved.extend(spread);
                }
                Ok(Outcome::Conflict) => {}
                Err(error) => {
                    tracing::debug!(volume = %volume.record.name, %error, "replicas could not be changed");
                }
            }
        }
    }

    fn log(&self, volume: &VolumeRecord, change: &Change) {
        let name = &volume.name;
        match change {
            Change::Add { set, node, .. } => {
                tracing::info!(volume = %name, set = set.0, node = %node.0, "a new copy is to be made");
            }
            Change::Move {
                set, node, from, ..
            } => {
                tracing::info!(volume = %name, set = set.0, node = %node.0, from_store = %from.0, "a copy is to move, to spread the load");
            }
            Change::Leave {
                set,
                store,
                leaving: true,
            } => {
                tracing::info!(volume = %name, set = set.0, store = %store.0, "a copy is to go when others suffice");
            }
            Change::Leave { set, store, .. } => {
                tracing::info!(volume = %name, set = set.0, store = %store.0, "a copy that was to go stays");
            }
            Change::Remove { set, store } => {
                tracing::info!(volume = %name, set = set.0, store = %store.0, "a copy that counts for nothing was forgotten");
            }
        }
    }

    /// Serves a volume that nobody has served for long, so that its copies are looked after. One at a time.
    fn open_unserved(
        self: &Arc<Controller>,
        read: &Look,
        current: &[Versioned<VolumeRecord>],
        wanted: &Wanted,
        memory: &mut Memory,
    ) {
        if memory
            .opening
            .as_ref()
            .is_some_and(|task| !task.is_finished())
        {
            return;
        }
        memory.tried.retain(|_, at| at.elapsed() < OPEN_AGAIN);
        let grace = Duration::from_millis(self.params.grace_ms);
        let unserved = &wanted.unserved;
        memory.headless.retain(|id, _| unserved.contains(id));
        let headless = &mut memory.headless;
        let mut is_due = |record: &VolumeRecord| {
            let since = headless.entry(record.id).or_insert_with(Instant::now);
            record.head.is_some() || since.elapsed() >= grace
        };
        let tried = &memory.tried;
        let volume = current.iter().find(|volume| {
            let id = volume.record.id;
            unserved.contains(&id) && is_due(&volume.record) && !tried.contains_key(&id)
        });
        let Some(volume) = volume else { return };
        memory.tried.insert(volume.record.id, Instant::now());
        let head = volume.record.head.map(|head| head.node);
        let store_of = |node| {
            let space = read.spaces.iter().find(|space| space.record.node == node);
            space.map(|space| space.record.store)
        };
        let is_member = |node| {
            let mut members = read.members.iter();
            members.any(|m| m.record.id == node && m.record.state == MemberState::Active)
        };
        let old = head
            .filter(|node| *node != self.node && is_member(*node))
            .and_then(|node| Some((node, store_of(node)?)));
        let (controller, name) = (self.clone(), volume.record.name.to_string());
        memory.opening = Some(tokio::spawn(async move {
            // Cut off from the metadata store alone it may serve its clients all the same, and they must not be sent
            // away for that.
            if let Some((node, store)) = old
                && controller.dial.dial(node, store).await.is_ok()
            {
                tracing::warn!(volume = name, node = %node.0, "the node that serves a volume is not heard of in the metadata store, but answers; the volume is left to it");
                return;
            }
            match controller.volumes.open_here(&name, None).await {
                Ok(_) => {
                    tracing::warn!(
                        volume = name,
                        "the node that served a volume has been away for long; it is served here, so that its copies are looked after"
                    );
                }
                Err(error) => {
                    tracing::warn!(volume = name, %error, "a volume whose node has been away for long could not be opened here; it is tried again");
                }
            }
        }));
    }

    /// The record of a volume as it is now. `None`: it is gone.
    async fn volume(&self, id: VolumeId) -> Result<Option<Versioned<VolumeRecord>>, MetadataError> {
        meta::read::<VolumeRecord>(&*self.records, &keys::volume(id)).await
    }
}

/// Who gets something new by a change.
fn target(change: &Change) -> Option<NodeId> {
    match change {
        Change::Add { node, .. } | Change::Move { node, .. } => Some(*node),
        Change::Leave { .. } | Change::Remove { .. } => None,
    }
}
