//! What stores hold, for whoever compares it with the records. It is asked in small pieces, between which the thread
//! does its other work.

use std::collections::BTreeMap;

use ashlar_core::replication::Seal;
use ashlar_core::store::{ExtentKey, LeafSums, RowOfVersions, StoreError};
use ashlar_core::units::{ChunkIndex, LayerId, StoreId, Version, VolumeId};
use tokio::sync::oneshot;

use super::command::{Answer, Command};
use super::config::DataError;
use super::facade::DataPlane;
use super::operation::Operation;
use super::thread::DataThread;

/// Most leaves of one question: some 200 µs of a data thread.
pub const SURVEY_LEAVES_MAX: usize = 8;
/// Chunks of which rows are told at once.
const ROWS_AT_ONCE: usize = 16;

/// Of each layer, its chunks and the newest version of them.
pub type HeldLayers = BTreeMap<LayerId, (u32, Version)>;

/// What is asked of a data thread.
pub(super) enum SurveyCommand {
    Held(Answer<Vec<(StoreId, HeldLayers)>>),
    Rows {
        store: StoreId,
        layer: LayerId,
        from: ChunkIndex,
        answer: Answer<Result<(Vec<RowOfVersions>, bool), DataError>>,
    },
    Sums {
        store: StoreId,
        extent: ExtentKey,
        leaves: Vec<u32>,
        answer: Answer<Result<Vec<LeafSums>, DataError>>,
    },
    /// Drops a layer from one store.
    Drop {
        store: StoreId,
        layer: LayerId,
        answer: Answer<Result<oneshot::Receiver<Result<(), StoreError>>, DataError>>,
    },
    /// The copy of a volume at a store does not count any more until it was compared and filled as a whole.
    Distrust {
        volume: VolumeId,
        store: StoreId,
        answer: Answer<Result<bool, DataError>>,
    },
    /// The seals of replicas that somebody has asked for since the start.
    Seals(Answer<Vec<(VolumeId, StoreId, Seal)>>),
}

/// Leaves being summed up; waits for the index where it has to be read.
pub(super) struct Survey {
    store: usize,
    extent: ExtentKey,
    leaves: Vec<u32>,
    done: Vec<LeafSums>,
    answer: Answer<Result<Vec<LeafSums>, DataError>>,
}

impl DataThread {
    pub(super) fn survey_command(&mut self, command: SurveyCommand) {
        match command {
            SurveyCommand::Held(answer) => {
                let held = self.stores.iter().map(|d| (d.id, d.store.held()));
                let _ = answer.send(held.collect());
            }
            SurveyCommand::Rows {
                store,
                layer,
                from,
                answer,
            } => {
                let rows = self.index_of(store).map(|at| {
                    let rows = &self.stores[at].store;
                    rows.row_versions(layer, from, |_| true, Version::NONE, ROWS_AT_ONCE)
                });
                let _ = answer.send(rows);
            }
            SurveyCommand::Sums {
                store,
                extent,
                mut leaves,
                answer,
            } => match self.index_of(store) {
                Err(error) => drop(answer.send(Err(error))),
                Ok(store) => {
                    leaves.truncate(SURVEY_LEAVES_MAX);
                    let key = self.operations.insert(Operation::Survey(Survey {
                        store,
                        extent,
                        leaves,
                        done: Vec::new(),
                        answer,
                    }));
                    self.go_on_with_survey(key);
                }
            },
            SurveyCommand::Drop {
                store,
                layer,
                answer,
            } => {
                let dropping = self.index_of(store).map(|at| self.drop_layer(at, layer));
                let _ = answer.send(dropping);
            }
            SurveyCommand::Distrust {
                volume,
                store,
                answer,
            } => {
                let found = self.replicated_by_id(volume);
                let distrusted = found.and_then(|volume| {
                    self.with_head(volume, |head, now_us, actions| {
                        head.distrust(store, now_us, actions)
                    })
                });
                let _ = answer.send(distrusted.ok_or(DataError::NotOpen(volume)));
            }
            SurveyCommand::Seals(answer) => {
                let replicas = self.cluster.replicas.iter().map(|(_, replica)| {
                    let store = self.stores[replica.store].id;
                    (replica.volume, store, replica.seal())
                });
                let untouched = self.cluster.seals.iter();
                let untouched = untouched.map(|((volume, store), seal)| (*volume, *store, *seal));
                let _ = answer.send(replicas.chain(untouched).collect());
            }
        }
    }

    /// Sums up leaves until one has to be read first; the store says when it is there.
    pub(super) fn go_on_with_survey(&mut self, key: usize) {
        loop {
            let Some(Operation::Survey(survey)) = self.operations.get_mut(key) else {
                return;
            };
            let store = survey.store;
            let Some(leaf) = survey.leaves.get(survey.done.len()).copied() else {
                return self.survey_ended(key, None);
            };
            match self.stores[store].store.leaf_sums(survey.extent, leaf) {
                Ok(Some(sums)) => survey.done.push(sums),
                Ok(None) => {
                    self.stores[store].waiting_for_index.push(key);
                    return;
                }
                Err(error) => return self.survey_ended(key, Some(error)),
            }
        }
    }

    fn survey_ended(&mut self, key: usize, error: Option<StoreError>) {
        if let Operation::Survey(survey) = self.operations.remove(key) {
            let outcome = match error {
                None => Ok(survey.done),
                Some(error) => Err(DataError::Store(error)),
            };
            let _ = survey.answer.send(outcome);
        }
    }
}

impl DataPlane {
    /// What every store holds.
    pub async fn held(&self) -> Result<Vec<(StoreId, HeldLayers)>, DataError> {
        let mut all = Vec::new();
        for thread in self.threads() {
            all.extend(
                thread
                    .ask(|answer| Command::Survey(SurveyCommand::Held(answer)))
                    .await?,
            );
        }
        Ok(all)
    }

    /// Whom the copies of this daemon follow.
    pub async fn seals(&self) -> Result<Vec<(VolumeId, StoreId, Seal)>, DataError> {
        let mut all = Vec::new();
        for thread in self.threads() {
            all.extend(
                thread
                    .ask(|answer| Command::Survey(SurveyCommand::Seals(answer)))
                    .await?,
            );
        }
        // Every thread knows all seals of the start, those of the others' stores too.
        let here = self.stores();
        all.retain(|(_, store, _)| here.iter().any(|opened| opened.id == *store));
        all.sort_by_key(|(volume, store, seal)| (*volume, *store, std::cmp::Reverse(seal.epoch)));
        all.dedup_by_key(|(volume, store, _)| (*volume, *store));
        Ok(all)
    }

    /// Rows of a layer from a chunk on, and whether there are more.
    pub async fn survey_rows(
        &self,
        store: StoreId,
        layer: LayerId,
        from: ChunkIndex,
    ) -> Result<(Vec<RowOfVersions>, bool), DataError> {
        let ask = |answer| {
            Command::Survey(SurveyCommand::Rows {
                store,
                layer,
                from,
                answer,
            })
        };
        self.thread_of_store(store)?.ask(ask).await?
    }

    /// What a store's index says of the blocks of leaves of one chunk, at most [`SURVEY_LEAVES_MAX`] of them.
    pub async fn survey_sums(
        &self,
        store: StoreId,
        extent: ExtentKey,
        leaves: Vec<u32>,
    ) -> Result<Vec<LeafSums>, DataError> {
        let ask = |answer| {
            Command::Survey(SurveyCommand::Sums {
                store,
                extent,
                leaves,
                answer,
            })
        };
        self.thread_of_store(store)?.ask(ask).await?
    }

    /// Drops a layer from one store; returns when that is durable.
    pub async fn drop_layer_at(&self, store: StoreId, layer: LayerId) -> Result<(), DataError> {
        let ask = |answer| {
            Command::Survey(SurveyCommand::Drop {
                store,
                layer,
                answer,
            })
        };
        let done = self.thread_of_store(store)?.ask(ask).await??;
        Ok(done.await.map_err(|_| DataError::Draining)??)
    }

    /// Puts a copy out of sync, to be compared and filled as a whole. False: the head cannot spare it, or it counts for
    /// nothing as it is.
    pub async fn distrust(&self, volume: VolumeId, store: StoreId) -> Result<bool, DataError> {
        let ask = |answer| {
            Command::Survey(SurveyCommand::Distrust {
                volume,
                store,
                answer,
            })
        };
        self.thread_of(volume)?.ask(ask).await?
    }
}
