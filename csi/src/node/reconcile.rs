//! After a restart, and for as long as the plugin runs: what is known is compared with what is, and devices whose server
//! went away get new connections.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use uuid::Uuid;

use super::Node;
use super::filesystem;
use super::state::VolumeState;
use crate::attach::{AttachError, Device, DeviceKind};
use crate::operations::Operations;
use crate::refusal::Refusal;

/// Between two looks at the connections. Requests of a device without one wait meanwhile.
const INTERVAL: Duration = Duration::from_secs(1);

impl Node {
    /// Brings the state files in line with the system. To be called once, before anything else.
    pub async fn reconcile(&self) -> Result<(), Refusal> {
        for state in self.states.all()? {
            let volume = state.export.volume;
            if state.boot_id != self.boot_id {
                // The machine was restarted: nothing is attached or mounted, whatever the file says. What the
                // orchestrator still wants it stages again.
                tracing::info!(volume = %volume, "forgetting a volume of before the machine was restarted");
                for attacher in &self.attachers {
                    if let Err(error) = attacher.detach(volume).await {
                        tracing::warn!(volume = %volume, %error, "clearing up failed");
                    }
                }
                self.states.remove(volume)?;
                continue;
            }
            let device = self.device_of(volume).await?;
            self.adopt(state, device)?;
        }
        Ok(())
    }

    /// Drops from the state what is not so any more.
    fn adopt(&self, mut state: VolumeState, device: Option<Device>) -> Result<(), Refusal> {
        let before = state.clone();
        let mounts = filesystem::mounts()?;
        state
            .targets
            .retain(|target| mounts.at(&target.path).is_some());
        if device.is_none() {
            state.stage.is_complete = false;
        }
        state.device = device;
        if state != before {
            self.states.save(&state)?;
        }
        tracing::info!(
            volume = %state.export.volume,
            device = state.device.as_ref().map_or("none", |device| device.name.as_str()),
            staged = state.stage.is_complete,
            targets = state.targets.len(),
            "found a volume"
        );
        Ok(())
    }

    /// Gives a kernel's NBD device as many new connections as it lacks. The daemon's count of connections tells, not
    /// the kernel's: the kernel says "connected" of a device whose sockets are all dead.
    async fn heal(&self, state: &VolumeState) -> Result<(), Refusal> {
        let volume = state.export.volume;
        if state.boot_id != self.boot_id {
            return Ok(());
        }
        let Some(device) = self.device_of(volume).await? else {
            return Ok(());
        };
        if device.kind != DeviceKind::KernelNbd {
            return Ok(());
        }
        let Ok(known) = self.daemon.volume(volume).await else {
            return Ok(());
        };
        let open = known
            .publications
            .iter()
            .find(|publication| publication.node_id == self.settings.node_id)
            .map(|publication| publication.connections);
        // Not published here: fenced on purpose.
        let whole = self.whole_connections(state, &device)?;
        let Some(missing) = open.and_then(|open| whole.checked_sub(open)) else {
            return Ok(());
        };
        if missing == 0 {
            return Ok(());
        }
        // Somebody had another daemon serve it; but it is published to this node, and nobody else can use it.
        if known.is_replicated
            && known.not_served.is_some()
            && let Err(refusal) = self.daemon.open(volume, &self.settings.node_id).await
        {
            tracing::debug!(volume = %volume, %refusal, "the daemon cannot serve the volume yet");
            return Ok(());
        }
        // Asked of the daemon that the connections are to: a daemon that lost power after this was read ends them itself.
        let may = async {
            let known = self.daemon.volume(volume).await;
            let known = known.map_err(|refusal| AttachError::Failed(refusal.message))?;
            if known.client_generation == state.client_generation {
                Ok(())
            } else {
                Err(AttachError::AnswersLost)
            }
        };
        // Not under the volume's turn: an operation that has it may be waiting for this very device. The kernel
        // refuses connections for a device that carries another volume by now, and for one that is let go.
        match self
            .attacher(device.kind)?
            .reconnect(&device, &state.export, missing, Box::pin(may))
            .await
        {
            Err(AttachError::AnswersLost) => self.give_up(volume, &device).await,
            Ok(given) => {
                tracing::info!(volume = %volume, device = device.name, given, "gave a device new connections");
            }
            Err(error) => {
                tracing::debug!(volume = %volume, device = device.name, %error, "no new connections yet");
            }
        }
        Ok(())
    }

    /// Fails a device whose volume lost answered writes: with a new connection its users would go on as if they were there.
    async fn give_up(&self, volume: Uuid, device: &Device) {
        let problem = ("AnswersLost", AttachError::AnswersLost.to_string());
        if self.problem(volume).as_ref() == Some(&problem) {
            return;
        }
        match self.fail_device(volume).await {
            Ok(()) => {
                tracing::error!(volume = %volume, device = device.name, "{}; the device answers errors until the volume is unstaged and staged again", problem.1);
                self.set_problem(volume, Some(problem));
            }
            Err(error) => {
                tracing::warn!(volume = %volume, device = device.name, %error, "{}, and the device could not be failed", problem.1);
            }
        }
    }
}

/// Looks after the connections of this node's devices until the task is dropped. A volume that cannot be opened for long keeps
/// no other one waiting.
pub async fn keep_connected(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut tasks = JoinSet::new();
    let healing = Operations::default();
    loop {
        ticks.tick().await;
        while tasks.try_join_next().is_some() {}
        let states = match node.states.all() {
            Ok(states) => states,
            Err(error) => {
                tracing::warn!(%error, "looking after connections failed");
                continue;
            }
        };
        for state in states {
            let volume = state.export.volume;
            let Ok(turn) = healing.begin(&volume.to_string()) else {
                continue;
            };
            let node = node.clone();
            tasks.spawn(async move {
                let _turn = turn;
                if let Err(error) = node.heal(&state).await {
                    tracing::warn!(volume = %volume, %error, "looking after connections failed");
                }
            });
        }
    }
}
