//! Gives back what this daemon's stores have left of sets that went elsewhere.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ashlar_core::records::{LeftoverRecord, Record, Transaction, Versioned, keys};
use ashlar_core::units::ChunkIndex;
use tokio::sync::watch;

use super::Controller;
use crate::data::DataConfig;
use crate::meta::{self, MetadataError, Outcome};
use crate::replication::space_records;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Nothing is given back before this daemon has known of it for so long, twice the lease of a head: the head that took
/// the replica out of its set asks it for nothing new from before that is recorded, and what it had asked for then is
/// answered by now, or was given up with the session.
const SETTLED_AFTER: Duration = DataConfig::LEASE.saturating_mul(2);
/// One set is given back for so long at a time: then it is looked whether that is still right, and others have a turn.
const TURN: Duration = Duration::from_secs(2);
/// Notes that go by one transaction: a condition and two effects each.
const NOTES_AT_ONCE: usize = 16;
/// Between two pieces, so that clients hardly notice.
const PAUSE: Duration = Duration::from_millis(20);

pub(super) async fn give_back(controller: Arc<Controller>, mut stop: watch::Receiver<bool>) {
    let mut known: HashMap<String, Instant> = HashMap::new();
    loop {
        if let Err(error) = look_once(&controller, &mut known).await {
            tracing::debug!(%error, "what stores are left with cannot be looked at");
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

async fn look_once(
    controller: &Controller,
    known: &mut HashMap<String, Instant>,
) -> Result<(), MetadataError> {
    let mut here: Vec<Versioned<LeftoverRecord>> =
        meta::list(&*controller.records, keys::LEFTOVERS).await?;
    let ours = controller.plane.stores();
    here.retain(|left| ours.iter().any(|store| store.id == left.record.store));
    known.retain(|key, _| here.iter().any(|left| left.record.key() == *key));
    let mut ready = Vec::new();
    for left in here {
        let since = known.entry(left.record.key()).or_insert_with(Instant::now);
        if since.elapsed() >= SETTLED_AFTER {
            ready.push(left);
        }
    }
    let mut given = Vec::new();
    for left in ready {
        if give_one_back(controller, &left.record).await? {
            given.push(left);
        }
    }
    if given.is_empty() {
        return Ok(());
    }
    // Durable before the notes go: nobody would look again.
    let mut stores: Vec<_> = given.iter().map(|left| left.record.store).collect();
    stores.sort_unstable();
    stores.dedup();
    for store in &stores {
        if let Err(error) = controller.plane.checkpoint(*store).await {
            tracing::warn!(store = %store.0, %error, "what a store was left with is not durably given back; it is tried again");
            return Ok(());
        }
    }
    // With the room as it is now, so that nobody plans with what was.
    let spaces = space_records(controller.node, &controller.plane).await;
    let mut sets = 0;
    for some in given.chunks(NOTES_AT_ONCE) {
        let mut transaction = Transaction::new();
        for left in some {
            let key = left.record.key();
            transaction = transaction
                .when_unchanged(key.clone(), left.changed_at)
                .delete(key);
        }
        for space in spaces.iter().filter(|space| stores.contains(&space.store)) {
            transaction = transaction.put(keys::space(space.store), space.encode());
        }
        // Somebody changed a note: it is looked at again.
        if let Outcome::Committed(_) = controller.records.commit(transaction).await? {
            sets += some.len();
        }
    }
    tracing::info!(
        sets,
        "what was left of copies that went elsewhere was given back"
    );
    Ok(())
}

/// True: nothing is left of it.
async fn give_one_back(
    controller: &Controller,
    left: &LeftoverRecord,
) -> Result<bool, MetadataError> {
    let volume = controller.volume(left.volume).await?;
    let is_a_copy = volume.as_ref().is_some_and(|volume| {
        let sets = &volume.record.placement.sets;
        let set = sets.get(usize::from(left.set));
        set.is_some_and(|set| set.replicas.iter().any(|r| r.store == left.store))
    });
    if is_a_copy {
        // No change is allowed to make it one while the note is there. Whoever did, its data come first.
        tracing::error!(volume = %left.volume.0, set = left.set, store = %left.store.0, "a store is to give back what it holds a copy of by the volume's record; nothing is given back");
        return Ok(false);
    }
    if volume.is_none() {
        for layer in &left.layers {
            if let Err(error) = controller.plane.delete_layer(*layer).await {
                tracing::warn!(layer = layer.0, %error, "the rest of a deleted volume could not be dropped");
                return Ok(false);
            }
        }
        return Ok(true);
    }
    let begun = Instant::now();
    for layer in &left.layers {
        let mut from = Some(ChunkIndex(0));
        while let Some(chunk) = from {
            if begun.elapsed() >= TURN {
                return Ok(false);
            }
            match controller.plane.give_back(left, *layer, chunk).await {
                Ok(next) => from = next,
                Err(error) => {
                    tracing::warn!(store = %left.store.0, %error, "a store cannot give back what it is left with");
                    return Ok(false);
                }
            }
            if from.is_some() {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    Ok(true)
}
