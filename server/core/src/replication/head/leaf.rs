//! One leaf compared and copied: for a replica that returns under the range lock, for the reconciliation without, and
//! for blocks that one copy cannot read.

use std::collections::VecDeque;

use smallvec::SmallVec;

use super::super::wire::{LeafStates, MAX_MESSAGE_BLOCKS, Status};
use super::super::{BlockContent, BlockState};
use super::members::Purpose;
use super::{
    Action, CopyId, INTERNAL_TAG, MemberId, News, OpKey, Outcome, QueryId, ReplicatedHead,
    WriteAdmission,
};
use crate::records::SetIndex;
use crate::store::ExtentKey;
use crate::units::{CHUNK_BLOCKS, ChunkIndex, LEAF_BLOCKS, Version};
use crate::volume::{Began, BlockRange, Refusal, Started, Ticket};

/// Blocks that are locked at a time while they are compared and copied (512 KiB): a client's request waits no longer
/// than that takes.
const WINDOW_BLOCKS: u32 = 128;
/// Windows are not split for fewer alike blocks between two that differ.
const GAP_BLOCKS: u32 = 16;
/// Copies of one job under way at a time.
const COPIES: u32 = 32;
/// Repairs at a time; what is damaged beyond that is found again by the next read.
const REPAIRS: usize = 8;

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
    states: SmallVec<[(MemberId, Option<LeafStates>); 3]>,
    windows: Vec<Window>,
    window: Window,
    ticket: Option<Ticket>,
    planned: VecDeque<Planned>,
    copying: u32,
    /// Something did not go as planned: compare the window again.
    again: bool,
    /// Copies that could not be read.
    bad: Vec<(MemberId, Window)>,
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

impl LeafJob {
    fn is_bad(&self, member: MemberId, block: u32) -> bool {
        self.bad
            .iter()
            .any(|(m, (first, count))| *m == member && (*first..first + count).contains(&block))
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
            JobFor::Resync(_) | JobFor::Repair => 0,
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
            states: SmallVec::new(),
            windows: Vec::new(),
            window: (0, 0),
            ticket: None,
            planned: VecDeque::new(),
            copying: 0,
            again: false,
            bad: Vec::new(),
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
            JobFor::Repair => SmallVec::new(),
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
                self.lose(asked.member, Some(status), actions);
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
        if job.states.iter().any(|(_, states)| states.is_none()) {
            return;
        }
        match (job.stage, job.what) {
            (Stage::Scanning, JobFor::Reconcile) => {
                job.stage = Stage::Copying;
                job.window = (job.leaf * LEAF_BLOCKS, LEAF_BLOCKS);
                job.plan(job.window);
                self.go_on_copying(key, actions);
            }
            (Stage::Scanning, _) => {
                job.windows = job.differing();
                job.windows.reverse();
                self.next_window(key, actions);
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
                self.go_on_copying(key, actions);
            }
            (Stage::Locking | Stage::Copying, _) => {}
        }
    }

    // -- windows

    /// Changes that both already have, and whose range is held until this job's replica is in sync: waiting for the
    /// range would be waiting for itself.
    fn settled_ranges(&self, job: &LeafJob) -> SmallVec<[Window; 4]> {
        let JobFor::Resync(member) = job.what else {
            return SmallVec::new();
        };
        let set = self.set(job.set);
        let both = set.bit_of(member) | set.usable();
        self.ops
            .iter()
            .filter(|(_, op)| {
                op.extent == job.extent && op.waiting == 0 && op.applied & both == both
            })
            .map(|(_, op)| (op.first_block, op.count))
            .collect()
    }

    /// Locks the next window, or ends the job.
    fn next_window(&mut self, key: JobKey, actions: &mut Vec<Action>) {
        loop {
            let Some(job) = self
                .jobs
                .get(key.place)
                .filter(|job| job.serial == key.serial)
            else {
                return;
            };
            let held = self.settled_ranges(job);
            let Some(job) = self.job(key) else { return };
            let Some((first, count)) = job.windows.pop() else {
                self.jobs.remove(key.place);
                return;
            };
            let overlaps =
                |(start, blocks): &&Window| *start < first + count && first < start + blocks;
            if let Some((start, blocks)) = held.iter().find(overlaps) {
                let (end, past) = (start + blocks, first + count);
                if past > end {
                    job.windows.push((end, past - end));
                }
                if *start > first {
                    job.windows.push((first, start - first));
                }
                continue;
            }
            job.window = (first, count);
            job.stage = Stage::Locking;
            let volume_first =
                u64::from(job.extent.chunk.0) * u64::from(CHUNK_BLOCKS) + u64::from(first);
            let range = BlockRange::new(volume_first, volume_first + u64::from(count))
                .expect("a window is not empty");
            let tag = INTERNAL_TAG | key.serial << 24 | key.place as u64;
            match self.admission.begin_ahead(range, tag) {
                Ok(Began::Now(started)) => {
                    self.job_locked(started, actions);
                    return;
                }
                Ok(Began::Waiting(ticket)) => {
                    if let Some(job) = self.job(key) {
                        job.ticket = Some(ticket);
                    }
                    return;
                }
                // Nothing changes it meanwhile.
                Err(Refusal::ReadOnly) => {
                    self.compare_window(key, actions);
                    return;
                }
                // Cut off by nobody: a volume never shrinks. A replica that has blocks there keeps them.
                Err(Refusal::PastEnd) => {}
                Err(Refusal::Draining | Refusal::VersionsExhausted) => {
                    if let Some(job) = self.job(key) {
                        job.windows.push((first, count));
                    }
                    return;
                }
            }
        }
    }

    /// A window's lock was given.
    pub(super) fn job_locked(&mut self, started: Started, actions: &mut Vec<Action>) {
        let tag = started.tag & !INTERNAL_TAG;
        let key = JobKey {
            place: (tag & 0xff_ffff) as usize,
            serial: tag >> 24,
        };
        // Whoever gives a job up gives back its lock too, started or not.
        if let Some(job) = self.job(key).filter(|job| job.stage == Stage::Locking) {
            job.ticket = Some(started.ticket);
            self.compare_window(key, actions);
        }
    }

    fn compare_window(&mut self, key: JobKey, actions: &mut Vec<Action>) {
        let Some(job) = self.job(key) else { return };
        job.again = false;
        if job.what == JobFor::Repair {
            self.plan_repair(key, actions);
            return;
        }
        job.stage = Stage::Comparing;
        self.ask_leaf(key, actions);
    }

    /// Jobs that could not lock, or wait for what waits for them.
    pub(super) fn unblock_jobs(&mut self, actions: &mut Vec<Action>) {
        if self.jobs.is_empty() {
            return;
        }
        let stuck: SmallVec<[JobKey; 8]> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.stage == Stage::Locking)
            .filter(|(_, job)| {
                let (first, count) = job.window;
                job.ticket.is_none()
                    || self
                        .settled_ranges(job)
                        .iter()
                        .any(|(start, blocks)| *start < first + count && first < start + blocks)
            })
            .map(|(place, job)| JobKey {
                place,
                serial: job.serial,
            })
            .collect();
        for key in stuck {
            let Some(job) = self.job(key) else { continue };
            if let Some(ticket) = job.ticket.take() {
                let window = job.window;
                job.windows.push(window);
                self.release(ticket, actions);
            }
            self.next_window(key, actions);
        }
    }

    // -- copies

    fn go_on_copying(&mut self, key: JobKey, actions: &mut Vec<Action>) {
        loop {
            let Some(job) = self.job(key) else { return };
            if job.copying >= COPIES {
                return;
            }
            let Some(planned) = job.planned.pop_front() else {
                if job.copying == 0 {
                    self.window_done(key, actions);
                }
                return;
            };
            job.copying += 1;
            let extent = job.extent;
            self.copy_serial += 1;
            let copy = CopyId(self.copy_serial);
            let (from, (first_block, count)) = (planned.from, planned.blocks);
            self.copies.insert(
                copy,
                Copy {
                    job: key,
                    planned,
                    waiting: SmallVec::new(),
                    reading: from.is_some(),
                    op: None,
                    since_us: self.now_us,
                },
            );
            match from {
                Some(member) => actions.push(Action::CopyRead {
                    copy,
                    member,
                    extent,
                    first_block,
                    count,
                }),
                None => self.write_copy(copy, actions),
            }
        }
    }

    fn window_done(&mut self, key: JobKey, actions: &mut Vec<Action>) {
        let Some(job) = self.job(key) else { return };
        if job.again {
            if job.what == JobFor::Reconcile {
                job.again = false;
                job.stage = Stage::Scanning;
                self.ask_leaf(key, actions);
            } else {
                self.compare_window(key, actions);
            }
            return;
        }
        let ticket = job.ticket.take();
        let what = job.what;
        if let Some(ticket) = ticket {
            self.release(ticket, actions);
        }
        if let JobFor::Resync(member) = what
            && let Some(resync) = self.resync_of(member)
        {
            resync.leaves_done += 1;
        }
        self.next_window(key, actions);
    }

    fn write_copy(&mut self, id: CopyId, actions: &mut Vec<Action>) {
        let Some(copy) = self.copies.get_mut(&id) else {
            return;
        };
        copy.reading = false;
        let (key, planned) = (copy.job, copy.planned.clone());
        let Some(job) = self.job(key) else { return };
        let (set, extent, what) = (job.set, job.extent, job.what);
        let (first_block, count) = planned.blocks;
        let mut op = None;
        let (members, version) = match planned.to {
            To::Members(members, version) => (members, version),
            To::Everybody if what == JobFor::Reconcile => {
                let Some(version) = self.admission.next_version() else {
                    return;
                };
                let all = self.set(set).members(self.set(set).in_sync);
                (all.into_iter().collect(), version)
            }
            To::Everybody => {
                let tag = INTERNAL_TAG | id.0;
                let offered = self.admission.next_version();
                let admitted = offered.map(|offered| {
                    self.admit_write(set, extent, first_block, count, tag, offered, self.now_us)
                });
                match admitted {
                    Some(WriteAdmission::Send {
                        op: key,
                        version,
                        targets,
                    }) => {
                        op = Some(key);
                        let members = self.set(set).members(targets.0);
                        (members.into_iter().collect(), version)
                    }
                    _ => {
                        self.end_copy(id, true, actions);
                        return;
                    }
                }
            }
        };
        let zeros = planned.from.is_none();
        if let Some(copy) = self.copies.get_mut(&id) {
            copy.waiting.clone_from(&members);
            copy.op = op;
            copy.since_us = self.now_us;
        }
        actions.extend(members.into_iter().map(|member| Action::CopyWrite {
            copy: id,
            member,
            extent,
            first_block,
            count,
            version,
            zeros,
        }));
    }

    pub(super) fn on_copy_read(&mut self, copy: CopyId, status: Status, actions: &mut Vec<Action>) {
        let Some(known) = self.copies.get(&copy).filter(|known| known.reading) else {
            return;
        };
        let (key, from, blocks) = (known.job, known.planned.from, known.planned.blocks);
        match (status, from) {
            (Status::Ok, _) => self.write_copy(copy, actions),
            (Status::Corrupt | Status::Device, Some(member)) => {
                self.read_failed(key, member, blocks, actions);
                self.end_copy(copy, true, actions);
            }
            (_, Some(member)) => self.lose(member, Some(status), actions),
            (_, None) => {}
        }
    }

    /// A copy cannot be read: another is looked for.
    fn read_failed(
        &mut self,
        key: JobKey,
        member: MemberId,
        blocks: Window,
        actions: &mut Vec<Action>,
    ) {
        let Some(job) = self.job(key) else { return };
        // Block by block: one that is damaged says nothing of its neighbours.
        if blocks.1 > 1 && job.what != JobFor::Repair {
            for block in blocks.0..blocks.0 + blocks.1 {
                if let Some(mut single) = job.plan_block(block) {
                    single.blocks = (block, 1);
                    job.planned.push_back(single);
                }
            }
            return;
        }
        job.bad.push((member, blocks));
        if let (JobFor::Resync(joiner), set) = (job.what, job.set) {
            // Another replica in sync is the source from now on, if there is one that was not tried.
            let bad: SmallVec<[MemberId; 3]> = job.bad.iter().map(|(m, _)| *m).collect();
            let members = self.set(set).members(self.set(set).usable());
            match members.iter().find(|m| !bad.contains(m)).copied() {
                Some(next) => {
                    if let Some(resync) = self.resync_of(joiner) {
                        resync.source = next;
                    }
                }
                // There is no good copy to give it: it stays out.
                None => self.lose(joiner, Some(Status::Corrupt), actions),
            }
        }
    }

    pub(super) fn on_copy_written(
        &mut self,
        copy: CopyId,
        member: MemberId,
        status: Status,
        actions: &mut Vec<Action>,
    ) {
        let Some(known) = self.copies.get_mut(&copy) else {
            return;
        };
        let Some(at) = known.waiting.iter().position(|m| *m == member) else {
            return;
        };
        known.waiting.swap_remove(at);
        let (key, op, done) = (known.job, known.op, known.waiting.is_empty());
        if let Some(op) = op {
            let set = self.job(key).map(|job| job.set);
            let place = set.and_then(|set| self.set(set).place_of(member));
            if let Some(place) = place {
                let outcome = self.answered(op, place as u8, status, self.now_us, actions);
                debug_assert_eq!(outcome, Outcome::Pending);
            }
            return;
        }
        if status != Status::Ok {
            self.lose(member, Some(status), actions);
            return;
        }
        self.at_mut(member).answered += 1;
        if done {
            self.end_copy(copy, false, actions);
        }
    }

    /// A new write of the head's own ended, or has to be made again.
    pub(super) fn rewritten(&mut self, tag: u64, outcome: Outcome, actions: &mut Vec<Action>) {
        let copy = CopyId(tag & !INTERNAL_TAG);
        let again = !matches!(outcome, Outcome::Acknowledge(_));
        self.end_copy(copy, again, actions);
    }

    fn end_copy(&mut self, id: CopyId, again: bool, actions: &mut Vec<Action>) {
        let Some(copy) = self.copies.remove(&id) else {
            return;
        };
        actions.push(Action::CopyEnd { copy: id });
        let Some(job) = self.job(copy.job) else {
            return;
        };
        job.copying -= 1;
        job.again |= again;
        let what = job.what;
        if !again
            && let JobFor::Resync(member) = what
            && let Some(resync) = self.resync_of(member)
        {
            resync.copied_blocks += u64::from(copy.planned.blocks.1);
        }
        self.go_on_copying(copy.job, actions);
    }

    pub(super) fn late_copy(&self, member: MemberId, limit_us: u64) -> bool {
        self.copies.values().any(|copy| {
            let owes = if copy.reading {
                copy.planned.from == Some(member)
            } else {
                copy.op.is_none() && copy.waiting.contains(&member)
            };
            owes && self.now_us >= copy.since_us + limit_us
        })
    }

    /// A member is lost: repairs that read from it try another. Other jobs that need it are given up by those they are
    /// for.
    pub(super) fn fail_copies_of(&mut self, member: MemberId, actions: &mut Vec<Action>) {
        let mut reading: SmallVec<[CopyId; 8]> = self
            .copies
            .iter()
            .filter(|(_, copy)| copy.reading && copy.planned.from == Some(member))
            .filter(|(_, copy)| {
                self.jobs
                    .get(copy.job.place)
                    .is_some_and(|job| job.what == JobFor::Repair)
            })
            .map(|(id, _)| *id)
            .collect();
        reading.sort_unstable_by_key(|id| id.0);
        for id in reading {
            let job = self
                .copies
                .get(&id)
                .map(|copy| (copy.job, copy.planned.blocks));
            if let Some((key, blocks)) = job {
                self.read_failed(key, member, blocks, actions);
            }
            self.end_copy(id, true, actions);
        }
    }

    pub(super) fn drop_jobs(&mut self, what: JobFor, actions: &mut Vec<Action>) {
        self.drop_jobs_if(|job| job.what == what, actions);
    }

    pub(super) fn drop_all_jobs(&mut self, actions: &mut Vec<Action>) {
        self.drop_jobs_if(|_| true, actions);
    }

    fn drop_jobs_if(&mut self, gone: impl Fn(&LeafJob) -> bool, actions: &mut Vec<Action>) {
        let places: SmallVec<[usize; 16]> = self
            .jobs
            .iter()
            .filter(|(_, job)| gone(job))
            .map(|(place, _)| place)
            .collect();
        let mut tickets: SmallVec<[Ticket; 16]> = SmallVec::new();
        for place in places {
            let job = self.jobs.remove(place);
            let key = JobKey {
                place,
                serial: job.serial,
            };
            let mut copies: SmallVec<[CopyId; 16]> = self
                .copies
                .iter()
                .filter(|(_, copy)| copy.job == key)
                .map(|(id, _)| *id)
                .collect();
            copies.sort_unstable_by_key(|id| id.0);
            for copy in copies {
                self.copies.remove(&copy);
                actions.push(Action::CopyEnd { copy });
            }
            self.queries
                .retain(|_, query| query.purpose != Purpose::Leaf { job: key });
            tickets.extend(job.ticket);
        }
        for ticket in tickets {
            self.release(ticket, actions);
        }
    }

    // -- repairs

    /// Blocks that one replica could not read and another could are written again from a good copy, to all.
    pub fn repair(
        &mut self,
        extent: ExtentKey,
        first_block: u32,
        count: u32,
        actions: &mut Vec<Action>,
    ) {
        if self.phase != super::Phase::Serving
            || count == 0
            || count > MAX_MESSAGE_BLOCKS
            || extent.layer != self.record.record.live_layer()
            || self.jobs_of(JobFor::Repair) >= REPAIRS
        {
            return;
        }
        let set = self.set_of(extent.chunk);
        let key = self.insert_job(JobFor::Repair, set, extent.chunk, first_block / LEAF_BLOCKS);
        if let Some(job) = self.job(key) {
            job.windows.push((first_block, count));
        }
        self.next_window(key, actions);
    }

    fn plan_repair(&mut self, key: JobKey, actions: &mut Vec<Action>) {
        let Some(job) = self.job(key) else { return };
        job.stage = Stage::Copying;
        let (set, window, extent) = (job.set, job.window, job.extent);
        let bad: SmallVec<[MemberId; 3]> = job.bad.iter().map(|(m, _)| *m).collect();
        let members = self.set(set).members(self.set(set).usable());
        let from = members.iter().find(|m| !bad.contains(m)).copied();
        let enough = self.set(set).usable().count_ones() >= self.min_in_sync();
        let Some(job) = self.job(key) else { return };
        match from {
            Some(_) if enough => {
                job.planned.push_back(Planned {
                    blocks: window,
                    from,
                    to: To::Everybody,
                });
                actions.push(Action::News(News::Repaired {
                    extent,
                    first_block: window.0,
                    count: window.1,
                }));
            }
            // No good copy, or too few replicas for a new write: left as it is.
            _ => job.windows.clear(),
        }
        self.go_on_copying(key, actions);
    }

    pub(super) fn advance_repairs(&mut self, actions: &mut Vec<Action>) {
        self.unblock_jobs(actions);
    }
}
