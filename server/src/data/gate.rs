//! What a request of some volumes has to pass before it is taken from its connection: the volume's limits, and, for the
//! first change that a volume ever gets, the record that says so.
//!
//! A volume with neither has no gate, and its requests nothing to pass. A request that may not pass stays where it was
//! received; its connection takes no more until then, so it holds no memory but the receive buffer.

use ashlar_core::nbd::request::{Command as Asked, Request as Parsed};
use ashlar_core::records::VolumeLimits;
use ashlar_core::units::VolumeId;
use ashlar_core::volume::Pace;
use std::time::{Duration, Instant};

use super::config::DataError;
use super::thread::DataThread;

/// Whether a volume counts as written in its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Written {
    Yes,
    No,
    /// No, and the control plane was asked to record it.
    Asked,
}

/// What stands before the head of a volume.
#[derive(Debug)]
pub(super) struct Gate {
    pace: Pace,
    written: Written,
}

/// Why a request may not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// Not before this moment, in nanoseconds of the thread's life.
    Until(u64),
    /// Not before it is recorded that the volume is written to.
    FirstChange,
}

/// A connection whose next request may not pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) connection: u32,
    volume: usize,
    hold: Hold,
}

fn pace(limits: VolumeLimits) -> Pace {
    Pace::new(limits.iops, limits.bytes_per_second)
}

/// Changes blocks, as far as anybody can tell before it is served.
fn changes(request: &Parsed) -> bool {
    match request.command {
        Asked::Write | Asked::Trim | Asked::WriteZeroes { .. } => request.length > 0,
        Asked::Read { .. } | Asked::Flush | Asked::Cache | Asked::BlockStatus { .. } => false,
    }
}

impl Gate {
    /// The gate of a volume that is being opened; `None`: it needs none.
    pub(super) fn new(limits: VolumeLimits, never_written: bool) -> Option<Box<Gate>> {
        let written = if never_written {
            Written::No
        } else {
            Written::Yes
        };
        Gate {
            pace: pace(limits),
            written,
        }
        .boxed()
    }

    fn boxed(self) -> Option<Box<Gate>> {
        (!self.pace.is_free() || self.written != Written::Yes).then(|| Box::new(self))
    }

    /// Whether a request whose header is here may pass now.
    pub(super) fn hold(&self, request: &Parsed, now_ns: u64) -> Option<Hold> {
        if self.written != Written::Yes && changes(request) {
            return Some(Hold::FirstChange);
        }
        self.pace.waits_until(now_ns).map(Hold::Until)
    }

    /// A request passed.
    pub(super) fn passed(&mut self, request: &Parsed, now_ns: u64) {
        let bytes = match request.command {
            Asked::Read { .. } | Asked::Write => request.length,
            _ => 0,
        };
        self.pace.take(now_ns, bytes);
    }
}

impl DataThread {
    pub(super) fn now_ns(&self) -> u64 {
        self.now.duration_since(self.born).as_nanos() as u64
    }

    /// The next request of this connection may not pass: it takes none until it may.
    pub(super) fn hold_back(&mut self, key: u32, hold: Hold) {
        let connection = &mut self.connections[key as usize];
        connection.is_paused = true;
        let volume = connection.volume;
        self.held.push(Held {
            connection: key,
            volume,
            hold,
        });
        let asks = &mut self.volumes[volume];
        if let (Hold::FirstChange, Some(gate)) = (hold, &mut asks.gate)
            && gate.written == Written::No
        {
            gate.written = Written::Asked;
            // Nobody listens any more when the daemon stops.
            let _ = self.tells.first_changes.send(asks.spec.id);
        }
    }

    /// When a held connection must be looked at though nothing happens.
    pub(super) fn holds_end(&self) -> Option<Instant> {
        let ends = self.held.iter().filter_map(|held| match held.hold {
            Hold::Until(ns) => Some(ns),
            Hold::FirstChange => None,
        });
        ends.min().map(|ns| self.born + Duration::from_nanos(ns))
    }

    /// Lets connections try again whose time has come.
    pub(super) fn end_holds(&mut self) {
        let now = self.now_ns();
        self.let_go(|held| matches!(held.hold, Hold::Until(ns) if ns <= now));
    }

    fn let_go(&mut self, may_try: impl Fn(&Held) -> bool) {
        let (go, stay): (Vec<_>, Vec<_>) = std::mem::take(&mut self.held)
            .into_iter()
            .partition(may_try);
        self.held = stay;
        for held in go {
            if let Some(connection) = self.connections.get_mut(held.connection as usize) {
                connection.is_paused = false;
                self.make_ready(held.connection);
            }
        }
    }

    /// It is recorded that the volume is written to.
    pub(super) fn first_change_recorded(&mut self, id: VolumeId) -> Result<(), DataError> {
        let key = self.volume_key(id)?;
        let volume = &mut self.volumes[key];
        if let Some(mut gate) = volume.gate.take() {
            gate.written = Written::Yes;
            volume.gate = gate.boxed();
        }
        self.let_go(|held| held.volume == key && held.hold == Hold::FirstChange);
        Ok(())
    }

    /// New limits, from the next request on.
    pub(super) fn set_limits(
        &mut self,
        id: VolumeId,
        limits: VolumeLimits,
    ) -> Result<(), DataError> {
        let key = self.volume_key(id)?;
        self.limit(key, limits);
        Ok(())
    }

    pub(super) fn limit(&mut self, key: usize, limits: VolumeLimits) {
        let volume = &mut self.volumes[key];
        let written = volume.gate.take().map_or(Written::Yes, |gate| gate.written);
        volume.gate = Gate {
            pace: pace(limits),
            written,
        }
        .boxed();
        self.let_go(|held| held.volume == key && matches!(held.hold, Hold::Until(_)));
    }

    /// A daemon that stops answers what it was sent at its own pace.
    pub(super) fn lift_limits(&mut self) {
        for key in 0..self.volumes.capacity() {
            if self.volumes.get(key).is_some_and(|v| v.gate.is_some()) {
                self.limit(key, VolumeLimits::default());
            }
        }
    }
}
