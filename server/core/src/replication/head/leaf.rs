//! One leaf compared and copied: for a replica that returns under the range lock, for the reconciliation without, and
//! for blocks that one copy cannot read.

mod copies;
mod windows;

use std::collections::VecDeque;

use smallvec::SmallVec;

use super::super::wire::{LeafStates, MAX_MESSAGE_BLOCKS, Status};
use super::super::{BlockContent, BlockState};
use super::members::Purpose;
use super::{Action, MemberId, OpKey, QueryId, ReplicatedHead};
use crate::records::SetIndex;
use crate::store::ExtentKey;
use crate::units::{ChunkIndex, LEAF_BLOCKS, Version};
use crate::volume::Ticket;

/// Blocks that are locked, compared and copied at a time (256 KiB): a client's request waits for their range no longer than
/// that takes.
pub(super) const WINDOW_BLOCKS: u32 = 64;
/// Windows are not split for fewer alike blocks between two that differ.
const GAP_BLOCKS: u32 = 16;
/// Copies of one job under way at a time.
const COPIES: u32 = 32;
/// Repairs at a time.
const REPAIRS: usize = 8;
/// Repairs that wait for their turn; what is damaged beyond that is found again by the next read or scrub.
const REPAIRS_WAITING: usize = 1024;

/// Whom a job is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JobFor {
    Reconcile,
    Resync(MemberId),
    Repair,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct JobKey {
    place: usize,
    serial: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The states are asked for, to see what differs.
    Scanning,
    /// The next window of a fill waits for its turn and the pace.
    Pausing,
    /// A window waits for its lock.
    Locking,
    /// The states are asked for again, under the lock.
    Comparing,
    /// What differs is being copied.
    Copying,
}

/// Blocks of one chunk, counted from its start.
type Window = (u32, u32);

/// One leaf being compared and copied.
#[derive(Debug)]
pub(super) struct LeafJob {
    serial: u64,
    what: JobFor,
    set: SetIndex,
    extent: ExtentKey,
    leaf: u32,
    stage: Stage,
    /// When it began to pause, counted in pauses.
    turn: u64,
    states: SmallVec<[(MemberId, Option<LeafStates>); 3]>,
    windows: Vec<Window>,
    window: Window,
    /// What the whole window was taken to cost at the pace of fills, before it was known how much of it has to be copied.
    counted_us: u64,
    ticket: Option<Ticket>,
    planned: VecDeque<Planned>,
    copying: u32,
    /// Something did not go as planned: compare the window again.
    again: bool,
    /// Copies that could not be read.
    bad: Vec<(MemberId, Window)>,
    /// One of them not because it is damaged: it may be readable later.
    is_transient: bool,
    /// Of a repair: what was written again.
    repaired: Vec<Window>,
    /// Of a repair: a replica has no room for it. What is under way ends, nothing more is begun.
    is_given_up: bool,
}

/// Blocks that cannot be read somewhere, to be written again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Damage {
    /// The replica that cannot read them, where it is known.
    bad: Option<MemberId>,
    extent: ExtentKey,
    blocks: Window,
}

/// A copy to be made.
#[derive(Clone, Debug)]
struct Planned {
    blocks: Window,
    from: Option<MemberId>,
    to: To,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum To {
    /// These lack it: with the version that it has.
    Members(SmallVec<[MemberId; 3]>, Version),
    /// One has something newer that counts for nothing: everybody gets it again, as a new write.
    Everybody,
}

/// A copy under way.
#[derive(Debug)]
pub(super) struct Copy {
    job: JobKey,
    planned: Planned,
    /// Who has not answered.
    waiting: SmallVec<[MemberId; 3]>,
    reading: bool,
    /// A new write of its own.
    op: Option<OpKey>,
    since_us: u64,
}

fn is_in((first, count): Window, block: u32) -> bool {
    (first..first + count).contains(&block)
}

impl LeafJob {
    fn is_bad(&self, member: MemberId, block: u32) -> bool {
        self.bad
            .iter()
            .any(|(m, window)| *m == member && is_in(*window, block))
    }

    /// What a member has of a block; what it cannot read is lost.
    fn state(&self, at: usize, block: u32) -> BlockState {
        let (member, states) = &self.states[at];
        let state = states
            .as_ref()
            .map_or(BlockState::HOLE, |s| s.0[(block % LEAF_BLOCKS) as usize]);
        if state.content == BlockContent::Data && self.is_bad(*member, block) {
            BlockState {
                content: BlockContent::Lost,
                ..state
            }
        } else {
            state
        }
    }

    /// What is to be done for one block; `None`: nothing.
    fn plan_block(&self, block: u32) -> Option<Planned> {
        let blocks = (block, 1);
        let states: SmallVec<[BlockState; 3]> = (0..self.states.len())
            .map(|at| self.state(at, block))
            .collect();
        let best = match self.what {
            // The newest that can be read.
            JobFor::Reconcile => (0..states.len())
                .filter(|at| states[*at].content != BlockContent::Lost)
                .max_by_key(|at| (states[*at].version, states.len() - at))?,
            // Whatever the replicas in sync have.
            JobFor::Resync(_) => 0,
            JobFor::Repair => return self.plan_repaired(block, &states),
        };
        let source = states[best];
        let lack: SmallVec<[MemberId; 3]> = (0..states.len())
            .filter(|at| *at != best && !source.is_like(states[*at]))
            .map(|at| self.states[at].0)
            .collect();
        if lack.is_empty() {
            return None;
        }
        let newer =
            self.states.iter().zip(&states).any(|((member, _), state)| {
                lack.contains(member) && state.version >= source.version
            });
        let to = if newer {
            To::Everybody
        } else {
            To::Members(lack, source.version)
        };
        let from = (!source.reads_as_zeros()).then_some(self.states[best].0);
        Some(Planned { blocks, from, to })
    }

    /// A block that some replica in sync cannot read is written again, to all, with what the others have. Where those have
    /// nothing, zeros do: bytes would take room that a full store does not have. Where some have bytes and some have not,
    /// one of their disks went back in time: that is left as it is, for somebody to look at.
    fn plan_repaired(&self, block: u32, states: &[BlockState]) -> Option<Planned> {
        if self.repaired.iter().any(|window| is_in(*window, block)) {
            return None;
        }
        let sound = |at: &usize| states[*at].content != BlockContent::Lost;
        let newest = |at: &usize| (states[*at].version, states.len() - at);
        let source = (0..states.len()).filter(sound).max_by_key(newest)?;
        let zeros = states.iter().filter(|state| state.reads_as_zeros()).count();
        let has_bytes = |state: &BlockState| state.content == BlockContent::Data;
        if zeros == states.len() || (zeros > 0 && states.iter().any(has_bytes)) {
            return None;
        }
        let from = (zeros == 0).then_some(self.states[source].0);
        Some(Planned {
            blocks: (block, 1),
            from,
            to: To::Everybody,
        })
    }

    /// Copies for a window, neighbours that are alike together.
    fn plan(&mut self, (first, count): Window) {
        for block in first..first + count {
            let Some(next) = self.plan_block(block) else {
                continue;
            };
            match self.planned.back_mut() {
                Some(last)
                    if last.blocks.0 + last.blocks.1 == block
                        && last.from == next.from
                        && last.to == next.to
                        && last.blocks.1 < MAX_MESSAGE_BLOCKS =>
                {
                    last.blocks.1 += 1;
                }
                _ => self.planned.push_back(next),
            }
        }
    }

    /// A block that differs, of which no copy can be read.
    fn unreadable(&self) -> Option<MemberId> {
        let (first, count) = self.window;
        let blocks = first..first + count;
        let at = blocks.into_iter().find_map(|block| {
            let mut states = (0..self.states.len()).map(|at| self.state(at, block));
            let lost = states.clone().all(|s| s.content == BlockContent::Lost);
            let version = states.next().map(|s| s.version);
            let differs = states.any(|s| Some(s.version) != version);
            (lost && differs).then_some(0)
        })?;
        Some(self.states[at].0)
    }

    /// A block of the window that the source itself cannot read.
    fn lost_at_source(&self) -> Option<(MemberId, u32)> {
        let (first, count) = self.window;
        (first..first + count)
            .find(|block| self.state(0, *block).content == BlockContent::Lost)
            .map(|block| (self.states[0].0, block))
    }

    /// The parts of the leaf that differ.
    fn differing(&self) -> Vec<Window> {
        let mut windows: Vec<Window> = Vec::new();
        let first = self.leaf * LEAF_BLOCKS;
        for block in first..first + LEAF_BLOCKS {
            let source = self.state(0, block);
            if (1..self.states.len()).all(|at| source.is_like(self.state(at, block))) {
                continue;
            }
            match windows.last_mut() {
                Some((start, count))
                    if block < *start + *count + GAP_BLOCKS && block - *start < WINDOW_BLOCKS =>
                {
                    *count = block - *start + 1;
                }
                _ => windows.push((block, 1)),
            }
        }
        windows
    }
}

impl ReplicatedHead {
    pub(super) fn jobs_of(&self, what: JobFor) -> usize {
        self.jobs.iter().filter(|(_, job)| job.what == what).count()
    }

    fn job(&mut self, key: JobKey) -> Option<&mut LeafJob> {
        self.jobs
            .get_mut(key.place)
            .filter(|job| job.serial == key.serial)
    }

    pub(super) fn start_job(
        &mut self,
        what: JobFor,
        set: SetIndex,
        chunk: ChunkIndex,
        leaf: u32,
        actions: &mut Vec<Action>,
    ) {
        let key = self.insert_job(what, set, chunk, leaf);
        self.ask_leaf(key, actions);
    }

    fn insert_job(&mut self, what: JobFor, set: SetIndex, chunk: ChunkIndex, leaf: u32) -> JobKey {
        self.job_serial += 1;
        let serial = self.job_serial;
        let place = self.jobs.insert(LeafJob {
            serial,
            what,
            set,
            extent: ExtentKey {
                layer: self.record.record.live_layer(),
                chunk,
            },
            leaf,
            stage: Stage::Scanning,
            turn: 0,
            states: SmallVec::new(),
            windows: Vec::new(),
            window: (0, 0),
            counted_us: 0,
            ticket: None,
            planned: VecDeque::new(),
            copying: 0,
            again: false,
            bad: Vec::new(),
            is_transient: false,
            repaired: Vec::new(),
            is_given_up: false,
        });
        JobKey { place, serial }
    }

    /// Asks everybody concerned for the states of the leaf.
    fn ask_leaf(&mut self, key: JobKey, actions: &mut Vec<Action>) {
        let Some(job) = self.job(key) else { return };
        let (what, set, extent, leaf) = (job.what, job.set, job.extent, job.leaf);
        let members: SmallVec<[MemberId; 3]> = match what {
            JobFor::Reconcile => self
                .set(set)
                .members(self.set(set).in_sync)
                .into_iter()
                .collect(),
            JobFor::Resync(member) => {
                let source = self.resync_of(member).map(|resync| resync.source);
                source.into_iter().chain([member]).collect()
            }
            JobFor::Repair => self
                .set(set)
                .members(self.set(set).readable())
                .into_iter()
                .collect(),
        };
        if let Some(job) = self.job(key) {
            job.states = members.iter().map(|member| (*member, None)).collect();
        }
        for member in members {
            let query = self.ask(member, Purpose::Leaf { job: key });
            actions.push(Action::ReadLeaf {
                query,
                member,
                extent,
                leaf,
            });
        }
    }

    pub(super) fn on_leaf(
        &mut self,
        query: QueryId,
        result: Result<LeafStates, Status>,
        actions: &mut Vec<Action>,
    ) {
        let Some(asked) = self.queries.remove(&query) else {
            return;
        };
        let Purpose::Leaf { job: key } = asked.purpose else {
            return;
        };
        let states = match result {
            Ok(states) => states,
            Err(status) => {
                let is_unreadable = matches!(status, Status::Corrupt | Status::Device);
                match self.job(key) {
                    // Its disk is what a repair is about: others may know.
                    Some(job) if job.what == JobFor::Repair && is_unreadable => {
                        job.states.retain(|(member, _)| *member != asked.member);
                        self.states_known(key, actions);
                    }
                    _ => self.lose(asked.member, Some(status), actions),
                }
                return;
            }
        };
        let Some(job) = self.job(key) else { return };
        for (member, slot) in &mut job.states {
            if *member == asked.member {
                *slot = Some(states);
                break;
            }
        }
        self.states_known(key, actions);
    }

    /// Goes on when everybody asked has answered.
    fn states_known(&mut self, key: JobKey, actions: &mut Vec<Action>) {
        let Some(job) = self.job(key) else { return };
        if job.states.iter().any(|(_, states)| states.is_none()) {
            return;
        }
        match (job.stage, job.what) {
            (Stage::Scanning, JobFor::Reconcile) => {
                job.stage = Stage::Copying;
                job.window = (job.leaf * LEAF_BLOCKS, LEAF_BLOCKS);
                match job.unreadable() {
                    // Served as it is, one copy might be read now and another later.
                    Some(member) if job.is_transient => {
                        self.lose(member, Some(Status::Device), actions);
                    }
                    _ => {
                        job.plan(job.window);
                        self.go_on_copying(key, actions);
                    }
                }
            }
            (Stage::Scanning, _) => {
                job.windows = job.differing();
                job.windows.reverse();
                self.next_window(key, actions);
            }
            (Stage::Comparing, JobFor::Repair) => {
                job.stage = Stage::Copying;
                job.plan(job.window);
                self.go_on_copying(key, actions);
            }
            (Stage::Comparing, _) => {
                job.stage = Stage::Copying;
                match job.lost_at_source() {
                    Some((source, block)) => {
                        job.again = true;
                        self.read_failed(key, source, (block, 1), actions);
                    }
                    None => job.plan(job.window),
                }
                // One that is compared again counts until it was.
                if self.job(key).is_some_and(|job| !job.again) {
                    self.settle_count(key);
                }
                self.go_on_copying(key, actions);
            }
            (Stage::Pausing | Stage::Locking | Stage::Copying, _) => {}
        }
    }
}
