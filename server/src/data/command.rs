//! What the control plane asks of a data thread, through its mailbox.

use std::time::Duration;

use ashlar_core::nbd::session::Admitted;
use ashlar_core::records::VolumeLimits;
use ashlar_core::store::StoreError;
use ashlar_core::units::{Epoch, LayerId, StoreId, VolumeId};
use ashlar_core::volume::{Head, HeadSpec};
use tokio::sync::oneshot;

use super::cluster::ClusterCommand;
use super::config::{
    ConnectionReport, DataError, StoreLayers, StoreReport, VolumeRuntime, VolumeSpec,
};
use super::connection::{Connection, Phase};
use super::gate::Gate;
use super::operation::{Operation, op_id};
use super::outbox::Outbox;
use super::receiver::Receiver;
use super::survey::SurveyCommand;
use super::thread::{DataThread, Drain, Volume, VolumeHead};
use crate::nbd::AttachedClient;

/// The answer goes where the command says; nobody listening is no error.
pub(super) type Answer<T> = oneshot::Sender<T>;

pub(super) enum Command {
    OpenVolume(Box<VolumeSpec>, Answer<Result<(), DataError>>),
    /// `force`: closes the connections; otherwise they are an error. Answered when nothing is in flight.
    CloseVolume {
        id: VolumeId,
        force: bool,
        answer: Answer<Result<oneshot::Receiver<()>, DataError>>,
    },
    ResizeVolume {
        id: VolumeId,
        size_bytes: u64,
        answer: Answer<Result<(), DataError>>,
    },
    SetReadOnly {
        id: VolumeId,
        read_only: bool,
        answer: Answer<Result<(), DataError>>,
    },
    /// Goes on under an epoch that was claimed for this.
    RenewEpoch {
        id: VolumeId,
        epoch: Epoch,
        answer: Answer<Result<(), DataError>>,
    },
    /// Serves these connections from now on, and was serving no other.
    Admit {
        id: VolumeId,
        admitted: Admitted,
        answer: Answer<Result<(), DataError>>,
    },
    /// Ends the connections that are not admitted any more.
    Fence {
        id: VolumeId,
        admitted: Option<Admitted>,
        answer: Answer<Result<(u32, oneshot::Receiver<()>), DataError>>,
    },
    SetLimits {
        id: VolumeId,
        limits: VolumeLimits,
        answer: Answer<Result<(), DataError>>,
    },
    FirstChangeRecorded {
        id: VolumeId,
        answer: Answer<Result<(), DataError>>,
    },
    /// As if a volume's head had given so many versions.
    #[cfg(test)]
    SetVersionsGiven {
        id: VolumeId,
        versions: u64,
        answer: Answer<Result<(), DataError>>,
    },
    VolumeStatus {
        id: VolumeId,
        answer: Answer<Option<VolumeRuntime>>,
    },
    Attach(Box<AttachedClient>),
    /// Puts the end of a layer into every store of the thread.
    DropLayer {
        layer: LayerId,
        answer: Answer<Vec<oneshot::Receiver<Result<(), StoreError>>>>,
    },
    Layers(Answer<Vec<StoreLayers>>),
    StoreStatuses(Answer<Vec<StoreReport>>),
    /// Begins a scrub at this rate; answers its number.
    StartScrub {
        store: StoreId,
        blocks_per_s: u64,
        answer: Answer<Result<u64, DataError>>,
    },
    /// Ends the scrub of this number, if it runs.
    StopScrub {
        store: StoreId,
        pass: u64,
        answer: Answer<Result<(), DataError>>,
    },
    /// Of one store of the thread, or of all.
    Checkpoint {
        store: Option<StoreId>,
        answer: Answer<Vec<oneshot::Receiver<Result<(), StoreError>>>>,
    },
    /// Of replicated volumes.
    Cluster(ClusterCommand),
    /// Of whoever compares what stores hold.
    Survey(SurveyCommand),
    Drain {
        patience: Duration,
        answer: Answer<()>,
    },
}

impl DataThread {
    pub(super) fn command(&mut self, command: Command) {
        match command {
            Command::OpenVolume(spec, answer) => {
                let _ = answer.send(self.open_volume(*spec));
            }
            Command::CloseVolume { id, force, answer } => {
                let _ = answer.send(self.close_volume(id, force));
            }
            Command::ResizeVolume {
                id,
                size_bytes,
                answer,
            } => {
                let _ = answer.send(self.resize_volume(id, size_bytes));
            }
            Command::SetReadOnly {
                id,
                read_only,
                answer,
            } => {
                let found = self.volume_key(id).map(|key| {
                    self.volumes[key]
                        .head
                        .admission_mut()
                        .set_read_only(read_only)
                });
                let _ = answer.send(found);
            }
            Command::RenewEpoch { id, epoch, answer } => {
                let _ = answer.send(self.renew_epoch(id, epoch));
            }
            Command::Admit {
                id,
                admitted,
                answer,
            } => {
                let _ = answer.send(self.admit(id, admitted));
            }
            Command::Fence {
                id,
                admitted,
                answer,
            } => {
                let _ = answer.send(self.fence(id, admitted));
            }
            Command::SetLimits { id, limits, answer } => {
                let _ = answer.send(self.set_limits(id, limits));
            }
            Command::FirstChangeRecorded { id, answer } => {
                let _ = answer.send(self.first_change_recorded(id));
            }
            #[cfg(test)]
            Command::SetVersionsGiven {
                id,
                versions,
                answer,
            } => {
                let found = self
                    .volume_key(id)
                    .map(|key| self.volumes[key].head.admission_mut().set_counter(versions));
                let _ = answer.send(found);
            }
            Command::VolumeStatus { id, answer } => {
                let _ = answer.send(self.volume_status(id));
            }
            Command::Attach(client) => self.attach(*client),
            Command::DropLayer { layer, answer } => {
                let answers = (0..self.stores.len())
                    .map(|store| self.drop_layer(store, layer))
                    .collect();
                let _ = answer.send(answers);
            }
            Command::Layers(answer) => {
                let _ = answer.send(
                    self.stores
                        .iter()
                        .map(|driver| (driver.id, driver.store.layers()))
                        .collect(),
                );
            }
            Command::StoreStatuses(answer) => {
                let _ = answer.send(self.store_statuses());
            }
            Command::StartScrub {
                store,
                blocks_per_s,
                answer,
            } => {
                let _ = answer.send(self.start_scrub(store, blocks_per_s));
            }
            Command::StopScrub {
                store,
                pass,
                answer,
            } => {
                let _ = answer.send(self.stop_scrub(store, pass));
            }
            Command::Checkpoint { store, answer } => {
                let answers = (0..self.stores.len())
                    .filter(|&index| store.is_none_or(|id| id == self.stores[index].id))
                    .collect::<Vec<_>>()
                    .into_iter()
                    .map(|store| self.task(store, |s, op| s.checkpoint(op)))
                    .collect();
                let _ = answer.send(answers);
            }
            Command::Cluster(command) => self.cluster_command(command),
            Command::Survey(command) => self.survey_command(command),
            Command::Drain { patience, answer } => {
                if self.drain.is_none() {
                    // One that is due is due again after the next start.
                    for driver in &mut self.stores {
                        driver.store.stop_scrub();
                    }
                    self.lift_limits();
                    // What clients had sent by now is answered.
                    for key in 0..self.connections.capacity() {
                        if self.connections.get(key).is_some_and(|c| !c.is_paused) {
                            self.serve(key as u32);
                        }
                    }
                    self.drain = Some(Drain {
                        answer,
                        give_up_at: self.now + patience,
                        closing: None,
                    });
                }
            }
        }
    }

    pub(super) fn volume_key(&self, id: VolumeId) -> Result<usize, DataError> {
        self.volume_keys
            .get(&id)
            .copied()
            .ok_or(DataError::NotOpen(id))
    }

    fn open_volume(&mut self, spec: VolumeSpec) -> Result<(), DataError> {
        if self.drain.is_some() {
            return Err(DataError::Draining);
        }
        if self.volume_keys.contains_key(&spec.id) {
            return Err(DataError::AlreadyOpen(spec.id));
        }
        let mut stores = Vec::with_capacity(spec.placement.stores.len());
        for id in &spec.placement.stores {
            stores.push(self.index_of(*id)?);
        }
        let head = Head::new(HeadSpec {
            volume: spec.id,
            size_bytes: spec.size_bytes,
            live_layer: spec.layer,
            epoch: spec.epoch,
            read_only: spec.read_only,
            stores: stores.len(),
        });
        let metrics = self.registry.add_volume(spec.id, &spec.name);
        let id = spec.id;
        let gate = Gate::new(spec.limits, spec.never_written);
        let key = self.volumes.insert(Volume {
            head: VolumeHead::Single(head),
            head_ended: false,
            gate,
            spec,
            stores,
            metrics,
            connections: Vec::new(),
            unlocked: 0,
            closing: None,
        });
        self.volume_keys.insert(id, key);
        Ok(())
    }

    fn close_volume(
        &mut self,
        id: VolumeId,
        force: bool,
    ) -> Result<oneshot::Receiver<()>, DataError> {
        let key = self.volume_key(id)?;
        let volume = &mut self.volumes[key];
        if !volume.connections.is_empty() && !force {
            return Err(DataError::InUse {
                volume: id,
                connections: volume.connections.len(),
            });
        }
        volume.head.admission_mut().drain();
        let (closed, answer) = oneshot::channel();
        volume.closing = Some(closed);
        // Not found by name any more: what is left of it ends by itself.
        self.volume_keys.remove(&id);
        for connection in volume.connections.clone() {
            self.leave(connection);
        }
        self.volume_may_close(key);
        Ok(answer)
    }

    /// Removes a volume that is being closed once nothing refers to it.
    pub(super) fn volume_may_close(&mut self, key: usize) {
        let Some(volume) = self.volumes.get(key) else {
            return;
        };
        let is_wanted = volume.closing.is_none() && !volume.head_ended;
        if is_wanted || !volume.connections.is_empty() || volume.unlocked > 0 {
            return;
        }
        // A head that is at its end gives no ranges back, and one with replicas has jobs of its own, which end with it.
        let is_idle = volume.head_ended
            || match self.replicated(key) {
                Some(volume) => self.requests_of(volume).is_empty(),
                None => volume.head.admission().is_idle(),
            };
        if !is_idle || !self.replication_may_close(key) {
            return;
        }
        let mut volume = self.volumes.remove(key);
        if !self.volume_keys.contains_key(&volume.spec.id) {
            self.registry.remove_volume(volume.spec.id);
        }
        if let Some(closed) = volume.closing.take() {
            let _ = closed.send(());
        }
    }

    fn resize_volume(&mut self, id: VolumeId, size_bytes: u64) -> Result<(), DataError> {
        let key = self.volume_key(id)?;
        let volume = &mut self.volumes[key];
        volume
            .head
            .admission_mut()
            .grow(size_bytes, volume.stores.len())
            .map_err(|refusal| DataError::Resize(refusal.to_string()))?;
        volume.spec.size_bytes = size_bytes;
        // Requests beyond the old end are valid from here on, whenever the client learns of the new one.
        for connection in &volume.connections {
            if let Some(connection) = self.connections.get_mut(*connection as usize) {
                connection.session.size_bytes = size_bytes;
            }
        }
        Ok(())
    }

    /// Asks the control plane for a new epoch when few versions are left of the present one.
    #[inline]
    pub(super) fn watch_epoch(&mut self, volume: usize) {
        let volume = &mut self.volumes[volume];
        if volume.head.admission_mut().asks_for_epoch() {
            // Nobody listens any more when the daemon stops.
            let _ = self.tells.epochs_wanted.send(volume.spec.id);
        }
    }

    fn renew_epoch(&mut self, id: VolumeId, epoch: Epoch) -> Result<(), DataError> {
        let key = self.volume_key(id)?;
        let volume = &mut self.volumes[key];
        // One with replicas raises its epoch itself.
        let VolumeHead::Single(head) = &mut volume.head else {
            return Ok(());
        };
        // A volume that was opened again meanwhile has a newer one.
        if epoch > head.epoch() {
            head.renew_epoch(epoch);
            volume.spec.epoch = epoch;
        }
        Ok(())
    }

    fn volume_status(&self, id: VolumeId) -> Option<VolumeRuntime> {
        let volume = &self.volumes[self.volume_key(id).ok()?];
        let (in_flight, waiting) = volume.head.admission().in_flight();
        let connections = volume
            .connections
            .iter()
            .filter_map(|key| self.connections.get(*key as usize))
            .map(|connection| ConnectionReport {
                serial: connection.serial,
                peer: connection.peer.clone(),
                connected_at: connection.connected_at,
                style: connection.session.style,
                base_allocation: connection.session.base_allocation,
                read_only: connection.session.read_only,
                token: connection.session.token,
                in_flight: connection.in_flight,
                requests: connection.requests,
                read_bytes: connection.read_bytes,
                written_bytes: connection.written_bytes,
            });
        Some(VolumeRuntime {
            connections: connections.collect(),
            size_bytes: volume.head.admission().size_bytes(),
            epoch: volume.head.admission().epoch(),
            in_flight,
            waiting,
            replication: self.replication_status(*self.volume_keys.get(&id)?),
        })
    }

    fn attach(&mut self, client: AttachedClient) {
        let peer = client.peer;
        if self.drain.is_some() {
            return;
        }
        let Ok(volume_key) = self.volume_key(client.session.volume) else {
            tracing::info!(peer, "the volume was closed while a client was connecting");
            return;
        };
        let admitted = &self.volumes[volume_key].spec.admitted;
        if !admitted.admits(client.session.token) {
            tracing::info!(
                peer,
                "the volume was published or unpublished while a client was connecting"
            );
            return;
        }
        if let Err(error) =
            rustix::fs::fcntl_setfl(client.stream.socket(), rustix::fs::OFlags::NONBLOCK)
        {
            tracing::warn!(peer, %error, "cannot take over a connection");
            return;
        }
        let entry = self.connections.vacant_entry();
        let key = entry.key() as u32;
        let watch = match self.engine.watch(client.stream.fd(), key) {
            Ok(watch) => watch,
            Err(error) => {
                tracing::warn!(peer, %error, "cannot watch a connection");
                return;
            }
        };
        let volume = &mut self.volumes[volume_key];
        let mut session = client.session;
        // It may have grown since the handshake.
        session.size_bytes = volume.head.admission().size_bytes();
        tracing::debug!(
            peer,
            volume = volume.spec.name,
            "connection in transmission"
        );
        entry.insert(Connection {
            stream: client.stream,
            watch,
            serial: self.next_serial,
            volume: volume_key,
            session,
            peer,
            receiver: Receiver::new(&client.leftover, &mut self.pool),
            outbox: Outbox::default(),
            phase: Phase::Open,
            connected_at: std::time::SystemTime::now(),
            requests: 0,
            read_bytes: 0,
            written_bytes: 0,
            in_flight: 0,
            held_bytes: 0,
            // Bytes may have arrived between the handshake's last read and the watch.
            readable: true,
            hang_up: false,
            is_ready: false,
            is_dirty: false,
            is_paused: false,
            is_blocked: false,
            was_idle: false,
            keeps_buffer: false,
            moved_at: self.now,
            _certified: client.certified,
            _slot: client.slot,
        });
        self.next_serial += 1;
        volume.connections.push(key);
        volume.metrics.connections.add(1);
        self.metrics.connections.add(1);
        self.metrics.connections_total.add(1);
        self.make_ready(key);
    }

    fn store_statuses(&self) -> Vec<StoreReport> {
        let report = |driver: &super::thread::StoreDriver| StoreReport {
            id: driver.id,
            path: driver.path.clone(),
            thread: self.index,
            engine: self.engine.name(),
            status: driver.store.status(),
        };
        self.stores.iter().map(report).collect()
    }

    /// Where the thread has a store.
    pub(super) fn index_of(&self, store: StoreId) -> Result<usize, DataError> {
        let found = self.stores.iter().position(|driver| driver.id == store);
        found.ok_or(DataError::NoSuchStore(store))
    }

    fn start_scrub(&mut self, store: StoreId, blocks_per_s: u64) -> Result<u64, DataError> {
        let at = self.index_of(store)?;
        let store = &mut self.stores[at].store;
        store.set_scrub_rate(blocks_per_s);
        Ok(store.start_scrub()?)
    }

    fn stop_scrub(&mut self, store: StoreId, pass: u64) -> Result<(), DataError> {
        let at = self.index_of(store)?;
        let store = &mut self.stores[at].store;
        if store.running_scrub() == Some(pass) {
            store.stop_scrub();
        }
        Ok(())
    }

    /// Starts something in a store that ends with a `Done`.
    pub(super) fn task(
        &mut self,
        store: usize,
        start: impl FnOnce(&mut ashlar_core::store::Store, ashlar_core::store::OpId),
    ) -> oneshot::Receiver<Result<(), StoreError>> {
        let (answer, done) = oneshot::channel();
        let key = self.operations.insert(Operation::Task(answer));
        start(&mut self.stores[store].store, op_id(key, 0));
        done
    }

    pub(super) fn drop_layer(
        &mut self,
        store: usize,
        layer: LayerId,
    ) -> oneshot::Receiver<Result<(), StoreError>> {
        let (answer, done) = oneshot::channel();
        let key = self.operations.insert(Operation::DropLayer {
            store,
            layer,
            answer,
        });
        self.try_drop_layer(key);
        done
    }

    pub(super) fn try_drop_layer(&mut self, key: usize) {
        let Some(Operation::DropLayer { store, layer, .. }) = self.operations.get(key) else {
            return;
        };
        let (store, layer) = (*store, *layer);
        match self.stores[store].store.drop_layer(op_id(key, 0), layer) {
            Ok(()) => {}
            Err(ashlar_core::store::WriteError::Failed(error)) => {
                if let Operation::DropLayer { answer, .. } = self.operations.remove(key) {
                    let _ = answer.send(Err(error));
                }
            }
            Err(_) => self.stores[store].parked.push_back(key),
        }
    }
}
