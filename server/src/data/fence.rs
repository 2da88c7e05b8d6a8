//! Ending the connections that a volume no longer admits.

use ashlar_core::nbd::session::Admitted;
use ashlar_core::units::VolumeId;
use tokio::sync::oneshot;

use super::config::DataError;
use super::connection::{ConnectionRef, Phase};
use super::operation::Operation;
use super::thread::DataThread;

/// Connections on their way out, and who waits for that.
pub(super) struct Fence {
    /// Key of the volume.
    volume: usize,
    ended: Vec<ConnectionRef>,
    done: Option<oneshot::Sender<()>>,
}

impl DataThread {
    /// Admits others from now on; refused, and nothing changed, while a connection is open that would not be.
    pub(super) fn admit(&mut self, id: VolumeId, admitted: Admitted) -> Result<(), DataError> {
        let key = self.volume_key(id)?;
        let strangers = self.strangers(key, Some(&admitted)).len();
        if strangers > 0 {
            return Err(DataError::InUse {
                volume: id,
                connections: strangers,
            });
        }
        self.volumes[key].spec.admitted = admitted;
        Ok(())
    }

    /// Admits others from now on (`None`: the same as before, and ends all connections) and ends the connections that
    /// are not admitted. Answers how many; the receiver gets its answer when nothing that they, or connections that
    /// broke before them, had asked for is under way any more.
    pub(super) fn fence(
        &mut self,
        id: VolumeId,
        admitted: Option<Admitted>,
    ) -> Result<(u32, oneshot::Receiver<()>), DataError> {
        let key = self.volume_key(id)?;
        let ended = self.strangers(key, admitted.as_ref());
        if let Some(admitted) = admitted {
            self.volumes[key].spec.admitted = admitted;
        }
        for connection in &ended {
            self.leave(connection.key);
        }
        let count = ended.len() as u32;
        let (done, answer) = oneshot::channel();
        self.fences.push(Fence {
            volume: key,
            ended,
            done: Some(done),
        });
        Ok((count, answer))
    }

    /// Connections of a volume that would not be admitted; all of them for `None`.
    fn strangers(&self, volume: usize, admitted: Option<&Admitted>) -> Vec<ConnectionRef> {
        let of_volume = self.volumes[volume].connections.iter();
        let strange = of_volume.filter_map(|key| {
            let connection = self.connections.get(*key as usize)?;
            let admits = |admitted: &Admitted| admitted.admits(connection.session.token);
            let is_strange = connection.phase != Phase::Dead && !admitted.is_some_and(admits);
            is_strange.then_some(ConnectionRef {
                key: *key,
                serial: connection.serial,
            })
        });
        strange.collect()
    }

    /// Called at the end of a turn: what could be answered was, and sent as far as the clients take it.
    pub(super) fn go_on_fencing(&mut self) {
        let mut fences = std::mem::take(&mut self.fences);
        for fence in &fences {
            for ended in &fence.ended {
                // A client that does not read its last answers is not waited for.
                if self
                    .alive(*ended)
                    .is_some_and(|connection| connection.in_flight == 0)
                {
                    self.kill(ended.key);
                }
            }
        }
        self.bury();
        fences.retain_mut(|fence| {
            let open = fence.ended.iter().any(|ended| self.alive(*ended).is_some());
            if open || self.has_orphans(fence.volume) {
                return true;
            }
            if let Some(done) = fence.done.take() {
                let _ = done.send(());
            }
            false
        });
        self.fences = fences;
    }

    fn alive(&self, connection: ConnectionRef) -> Option<&super::connection::Connection> {
        self.connections
            .get(connection.key as usize)
            .filter(|known| known.serial == connection.serial)
    }

    /// Whether something is under way that was asked for on a connection that is gone.
    fn has_orphans(&self, volume: usize) -> bool {
        self.operations
            .iter()
            .any(|(_, operation)| match operation {
                Operation::Request(request) => {
                    request.volume == volume && self.alive(request.connection).is_none()
                }
                Operation::Replicated(replicated) => {
                    let request = &replicated.request;
                    request.volume == volume && self.alive(request.connection).is_none()
                }
                Operation::DropLayer { .. }
                | Operation::Task(_)
                | Operation::Survey(_)
                | Operation::Replica(_) => false,
            })
    }
}
