//! The copies of a job, and the repair of blocks that one replica cannot read.

use smallvec::SmallVec;

use super::super::super::wire::{MAX_MESSAGE_BLOCKS, Status};
use super::super::members::Purpose;
use super::super::write::{op_key, op_place};
use super::super::{
    Action, CopyId, INTERNAL_TAG, MemberId, News, Outcome, Phase, ReplicatedHead, WriteAdmission,
};
use super::{
    COPIES, Copy, Damage, JobFor, JobKey, LeafJob, REPAIRS, REPAIRS_WAITING, Stage, To, Window,
};
use crate::records::SetIndex;
use crate::store::ExtentKey;
use crate::units::{BLOCK_BYTES, CHUNK_BLOCKS, LEAF_BLOCKS};
use crate::volume::Ticket;

impl ReplicatedHead {
    pub(super) fn go_on_copying(&mut self, key: JobKey, actions: &mut Vec<Action>) {
        loop {
            let Some(job) = self.job(key) else { return };
            // A copy that ended at once may have ended the window too.
            if job.copying >= COPIES || job.stage != Stage::Copying {
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
        if job.again && !job.is_given_up {
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
        if let Some(first_block) = job.repaired.iter().map(|(first, _)| *first).min() {
            actions.push(Action::News(News::Repaired {
                extent: job.extent,
                first_block,
                count: job.repaired.iter().map(|(_, count)| count).sum(),
            }));
        }
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

    pub(in super::super) fn on_copy_read(
        &mut self,
        copy: CopyId,
        status: Status,
        actions: &mut Vec<Action>,
    ) {
        let Some(known) = self.copies.get(&copy) else {
            // Given up meanwhile: what was read is of no use any more.
            actions.push(Action::CopyEnd { copy });
            return;
        };
        if !known.reading {
            return;
        }
        let (key, from, blocks) = (known.job, known.planned.from, known.planned.blocks);
        match (status, from) {
            (Status::Ok, _) => self.write_copy(copy, actions),
            (Status::Corrupt | Status::Device, Some(member)) => {
                if let Some(job) = self.job(key) {
                    job.is_transient |= status == Status::Device;
                }
                self.read_failed(key, member, blocks, actions);
                self.end_copy(copy, true, actions);
            }
            (_, Some(member)) => self.lose(member, Some(status), actions),
            (_, None) => {}
        }
    }

    /// A copy cannot be read: another is looked for.
    pub(super) fn read_failed(
        &mut self,
        key: JobKey,
        member: MemberId,
        blocks: Window,
        actions: &mut Vec<Action>,
    ) {
        let Some(job) = self.job(key).filter(|job| !job.is_given_up) else {
            return;
        };
        // Block by block: one that is damaged says nothing of its neighbours.
        if blocks.1 > 1 {
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
            let members = self.set(set).members(self.set(set).readable());
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

    pub(in super::super) fn on_copy_written(
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
        let (op, done) = (known.op, known.waiting.is_empty());
        if let Some(op) = op {
            // Its job may have been given up meanwhile: the change is under way all the same.
            let set = self.ops.get(op_place(op).0).map(|op| op.set);
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
    pub(in super::super) fn rewritten(
        &mut self,
        tag: u64,
        outcome: Outcome,
        actions: &mut Vec<Action>,
    ) {
        let copy = CopyId(tag & !INTERNAL_TAG);
        let again = !matches!(outcome, Outcome::Acknowledge(_));
        if let (Outcome::Fail(..), Some(known)) = (outcome, self.copies.get(&copy)) {
            // What was refused is what those in sync have: they lack nothing by it.
            let key = known.job;
            match self.job(key).map(|job| job.what) {
                Some(JobFor::Resync(joiner)) => {
                    self.lose(joiner, Some(Status::NoSpace), actions);
                }
                _ => self.give_up_repair(key),
            }
        }
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
        let (what, (first_block, count)) = (job.what, copy.planned.blocks);
        match what {
            JobFor::Resync(member) if !again => {
                if let Some(resync) = self.resync_of(member) {
                    resync.copied_blocks += u64::from(count);
                }
            }
            JobFor::Repair if !again => job.repaired.push((first_block, count)),
            _ => {}
        }
        self.go_on_copying(copy.job, actions);
    }

    /// Members that the jobs for something compare.
    pub(in super::super) fn compared_for(&self, what: JobFor) -> impl Iterator<Item = MemberId> {
        let of = self.jobs.iter().filter(move |(_, job)| job.what == what);
        of.flat_map(|(_, job)| job.states.iter().map(|(member, _)| *member))
    }

    /// Panics when a job, a copy or a change of the head's own can never end.
    pub(in super::super) fn check_jobs(&self) {
        for (at, op) in self.ops.iter().filter(|(_, op)| op.tag >= INTERNAL_TAG) {
            let copy = self.copies.get(&CopyId(op.tag & !INTERNAL_TAG));
            let is_its = copy.is_some_and(|copy| copy.op == Some(op_key(at, op.serial)));
            assert!(is_its, "{op:?} is a copy's");
        }
        for (place, job) in &self.jobs {
            let serial = job.serial;
            let purpose = Purpose::Leaf {
                job: JobKey { place, serial },
            };
            let is_asked = |member: MemberId| {
                let mut queries = self.queries.values();
                queries.any(|query| query.member == member && query.purpose == purpose)
            };
            assert!(
                job.stage != Stage::Pausing
                    || self.fill_due_us.is_some()
                    || !self.urgent_fills().is_empty(),
                "{job:?} pauses and nobody calls it"
            );
            if matches!(job.stage, Stage::Scanning | Stage::Comparing) {
                let mut unknown = job.states.iter().filter(|(_, states)| states.is_none());
                assert!(
                    unknown.clone().count() > 0,
                    "{job:?} compares without asking"
                );
                assert!(
                    unknown.all(|(member, _)| self.at(*member).is_open() && is_asked(*member)),
                    "{job:?} waits for somebody who was not asked"
                );
            }
        }
        for (id, copy) in &self.copies {
            let is_for_something = match copy.op {
                Some(op) => {
                    let (at, serial) = op_place(op);
                    self.ops.get(at).is_some_and(|op| op.serial == serial)
                }
                None => {
                    let job = self.jobs.get(copy.job.place);
                    job.is_some_and(|job| job.serial == copy.job.serial)
                }
            };
            assert!(is_for_something, "{id:?} is for a change or a job");
            let asked: SmallVec<[MemberId; 3]> = match (copy.reading, copy.op) {
                (true, _) => copy.planned.from.into_iter().collect(),
                (false, None) => copy.waiting.clone(),
                // The write is waited for by its operation.
                (false, Some(_)) => SmallVec::new(),
            };
            for member in asked {
                assert!(self.at(member).is_open(), "{id:?} waits for {member:?}");
            }
        }
    }

    pub(in super::super) fn late_copy(&self, member: MemberId, limit_us: u64) -> bool {
        self.copies.values().any(|copy| {
            let owes = if copy.reading {
                copy.planned.from == Some(member)
            } else {
                copy.op.is_none() && copy.waiting.contains(&member)
            };
            owes && self.now_us >= copy.since_us + limit_us
        })
    }

    /// A member is lost, or what it has of a set is not to be read any more: repairs go on with others. Other jobs that
    /// need it are given up by those they are for.
    pub(in super::super) fn repair_without(
        &mut self,
        member: MemberId,
        of: impl Fn(SetIndex) -> bool,
        actions: &mut Vec<Action>,
    ) {
        let mut waiting: SmallVec<[JobKey; REPAIRS]> = SmallVec::new();
        for (place, job) in &mut self.jobs {
            if job.what != JobFor::Repair || !of(job.set) {
                continue;
            }
            job.states.retain(|(m, _)| *m != member);
            let before = job.planned.len();
            job.planned.retain(|planned| planned.from != Some(member));
            job.again |= job.planned.len() != before;
            if job.stage == Stage::Comparing {
                let serial = job.serial;
                waiting.push(JobKey { place, serial });
            }
        }
        let is_repair = |key: JobKey| {
            let job = self.jobs.get(key.place);
            job.is_some_and(|job| job.what == JobFor::Repair && of(job.set))
        };
        let mut reading: SmallVec<[CopyId; 8]> = self
            .copies
            .iter()
            .filter(|(_, copy)| copy.reading && copy.planned.from == Some(member))
            .filter(|(_, copy)| is_repair(copy.job))
            .map(|(id, _)| *id)
            .collect();
        reading.sort_unstable_by_key(|id| id.0);
        for id in reading {
            self.end_copy(id, true, actions);
        }
        for key in waiting {
            self.queries.retain(|_, query| {
                query.member != member || query.purpose != Purpose::Leaf { job: key }
            });
            self.states_known(key, actions);
        }
    }

    pub(in super::super) fn drop_jobs(&mut self, what: JobFor, actions: &mut Vec<Action>) {
        self.drop_jobs_if(|job| job.what == what, actions);
    }

    pub(in super::super) fn drop_all_jobs(&mut self, actions: &mut Vec<Action>) {
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
            self.uncount_filled(job.counted_us);
            let key = JobKey {
                place,
                serial: job.serial,
            };
            let mut copies: SmallVec<[CopyId; 16]> = self
                .copies
                .iter()
                // A change that was sent goes on until it is answered: those that take it must not seem silent.
                .filter(|(_, copy)| copy.job == key && copy.op.is_none())
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

    /// Blocks that a replica cannot read are written again from a good copy, to all. `bad`: which replica that is, where it
    /// is known.
    pub fn repair(
        &mut self,
        bad: Option<MemberId>,
        extent: ExtentKey,
        first_block: u32,
        count: u32,
        actions: &mut Vec<Action>,
    ) {
        // What lies behind the end of the volume is nobody's.
        let blocks = self.record.record.size_bytes / BLOCK_BYTES as u64;
        let before = u64::from(extent.chunk.0) * u64::from(CHUNK_BLOCKS) + u64::from(first_block);
        let count = blocks.saturating_sub(before).min(u64::from(count)) as u32;
        if self.phase != Phase::Serving
            || count > MAX_MESSAGE_BLOCKS
            || extent.layer != self.record.record.live_layer()
        {
            return;
        }
        let (mut first, end) = (first_block, first_block + count);
        while first < end {
            let next = end.min((first / LEAF_BLOCKS + 1) * LEAF_BLOCKS);
            let damage = Damage {
                bad,
                extent,
                blocks: (first, next - first),
            };
            if self.damages.len() < REPAIRS_WAITING && !self.damages.contains(&damage) {
                self.damages.push_back(damage);
            }
            first = next;
        }
        self.advance_repairs(actions);
    }

    /// Whether a new write could be made: with too few replicas for one, what is damaged is left as it is.
    pub(super) fn can_repair(&self, set: SetIndex) -> bool {
        self.set(set).usable().count_ones() >= self.min_in_sync()
    }

    pub(super) fn give_up_repair(&mut self, key: JobKey) {
        if let Some(job) = self.job(key) {
            job.is_given_up = true;
            job.planned.clear();
            job.windows.clear();
        }
    }

    pub(in super::super) fn advance_repairs(&mut self, actions: &mut Vec<Action>) {
        while !self.damages.is_empty()
            && self.jobs_of(JobFor::Repair) < REPAIRS
            && let Some(damage) = self.damages.pop_front()
        {
            let (extent, (first_block, count)) = (damage.extent, damage.blocks);
            let set = self.set_of(extent.chunk);
            let leaf = first_block / LEAF_BLOCKS;
            let key = self.insert_job(JobFor::Repair, set, extent.chunk, leaf);
            if let Some(job) = self.job(key) {
                job.windows.push(damage.blocks);
                let bad = damage.bad.into_iter();
                job.bad
                    .extend(bad.map(|member| (member, (first_block, count))));
            }
            self.next_window(key, actions);
        }
        self.unblock_jobs(actions);
    }
}
