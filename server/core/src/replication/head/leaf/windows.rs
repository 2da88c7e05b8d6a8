//! The windows of a job: each is locked and compared. Those of fills wait for their turn and the pace, and count for it.

use smallvec::SmallVec;

use super::super::{Action, INTERNAL_TAG, MemberId, Phase, ReplicatedHead};
use super::{JobFor, JobKey, LeafJob, Stage, Window};
use crate::units::CHUNK_BLOCKS;
use crate::volume::{Began, BlockRange, Refusal, Started};

impl ReplicatedHead {
    /// Changes that both already have, and whose range is held until this job's replica is in sync: waiting for the
    /// range would be waiting for itself.
    fn settled_ranges(&self, job: &LeafJob) -> SmallVec<[Window; 4]> {
        let JobFor::Resync(member) = job.what else {
            return SmallVec::new();
        };
        self.ops
            .iter()
            .filter(|(_, op)| op.extent == job.extent && self.is_held_for(op, member))
            .map(|(_, op)| (op.first_block, op.count))
            .collect()
    }

    /// Counts all of a window that a fill begins: which of its blocks have to be copied is known once it is locked.
    fn count_window(&mut self, key: JobKey) {
        let Some(job) = self.job(key) else { return };
        let blocks = job.window.1;
        if let JobFor::Resync(member) = job.what {
            let counted_us = self.count_filled(member, blocks);
            if let Some(job) = self.job(key) {
                job.counted_us = counted_us;
            }
        }
    }

    /// The window was compared or is given back: what is not copied does not count.
    pub(super) fn settle_count(&mut self, key: JobKey) {
        let Some(job) = self.job(key) else { return };
        let planned: u32 = job.planned.iter().map(|planned| planned.blocks.1).sum();
        let blocks = job.window.1;
        let spared = blocks.saturating_sub(planned);
        let counted_us = std::mem::take(&mut job.counted_us);
        self.uncount_filled(counted_us * u64::from(spared) / u64::from(blocks.max(1)));
    }

    /// Locks the next window, or ends the job. A fill takes its turn among all of them.
    pub(super) fn next_window(&mut self, key: JobKey, actions: &mut Vec<Action>) {
        let turn = self.fill_turns;
        let Some(job) = self.job(key) else { return };
        if matches!(job.what, JobFor::Resync(_)) && !job.windows.is_empty() {
            (job.stage, job.turn) = (Stage::Pausing, turn);
            self.fill_turns += 1;
            // At the end of this event, or as soon as there is another.
            self.fill_due_us = Some(self.now_us);
        } else {
            self.begin_window(key, actions);
        }
    }

    /// Begins windows of fills as the pace allows.
    pub(in super::super) fn advance_fills(&mut self, actions: &mut Vec<Action>) {
        self.fill_due_us = None;
        while self.phase == Phase::Serving
            && let Some((key, member)) = self.next_fill()
            && self.may_fill()
        {
            self.begin_window(key, actions);
            // What it had left needs no copying.
            if self.job(key).is_none() {
                self.go_on_with(member, actions);
            }
        }
    }

    /// Whose window is next: who has waited longest, and nobody else's while a copy that is missing is made.
    fn next_fill(&self) -> Option<(JobKey, MemberId)> {
        let pausing = self.jobs.iter().filter_map(|(place, job)| match job.what {
            JobFor::Resync(member) if job.stage == Stage::Pausing => Some((place, job, member)),
            _ => None,
        });
        // Mostly there are none, and then nothing else is looked at.
        let mut pausing = pausing.peekable();
        pausing.peek()?;
        let urgent = self.urgent_fills();
        let may_go = |member: MemberId| urgent.is_empty() || urgent.contains(&member);
        let next = pausing.filter(|(.., member)| may_go(*member));
        let (place, job, member) = next.min_by_key(|(_, job, _)| job.turn)?;
        let serial = job.serial;
        Some((JobKey { place, serial }, member))
    }

    fn begin_window(&mut self, key: JobKey, actions: &mut Vec<Action>) {
        loop {
            let Some(job) = self
                .jobs
                .get(key.place)
                .filter(|job| job.serial == key.serial)
            else {
                return;
            };
            let held = self.settled_ranges(job);
            // It would lock a range behind writes that wait for more replicas, and have reads wait with it.
            if job.what == JobFor::Repair && !self.can_repair(job.set) {
                self.give_up_repair(key);
            }
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
                    self.count_window(key);
                    self.job_locked(started, actions);
                    return;
                }
                Ok(Began::Waiting(ticket)) => {
                    self.count_window(key);
                    if let Some(job) = self.job(key) {
                        job.ticket = Some(ticket);
                    }
                    return;
                }
                // Nothing changes it meanwhile.
                Err(Refusal::ReadOnly) => {
                    self.count_window(key);
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
    pub(in super::super) fn job_locked(&mut self, started: Started, actions: &mut Vec<Action>) {
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

    pub(super) fn compare_window(&mut self, key: JobKey, actions: &mut Vec<Action>) {
        let Some(job) = self.job(key) else { return };
        job.again = false;
        job.stage = Stage::Comparing;
        let (what, set) = (job.what, job.set);
        if what == JobFor::Repair && !self.can_repair(set) {
            self.give_up_repair(key);
            if let Some(job) = self.job(key) {
                job.stage = Stage::Copying;
            }
            self.go_on_copying(key, actions);
            return;
        }
        self.ask_leaf(key, actions);
    }

    /// Jobs that could not lock, or wait for what waits for them.
    pub(in super::super) fn unblock_jobs(&mut self, actions: &mut Vec<Action>) {
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
                    || (job.what == JobFor::Repair && !self.can_repair(job.set))
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
                self.settle_count(key);
                self.release(ticket, actions);
            }
            self.next_window(key, actions);
        }
    }
}
