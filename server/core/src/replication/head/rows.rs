//! Walking over the chunks of a set on several members at once, to find the leaves that may differ.

use std::collections::VecDeque;

use smallvec::SmallVec;

use super::super::wire::{RowVersions, Rows, Status};
use super::members::Purpose;
use super::{Action, MemberId, QueryId, ReplicatedHead};
use crate::records::SetIndex;
use crate::units::{CHUNK_LEAVES, ChunkIndex, Version};

/// Whose walk a question belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowsOf {
    Reconcile,
    Resync(MemberId),
}

/// One member's page of rows.
#[derive(Debug)]
struct Page {
    member: MemberId,
    query: Option<QueryId>,
    rows: Option<Rows>,
}

/// A walk over one set.
#[derive(Debug)]
pub(super) struct RowsWalk {
    pub(super) set: SetIndex,
    floor: Version,
    from: ChunkIndex,
    pages: SmallVec<[Page; 4]>,
    /// Leaves to be looked at.
    pub(super) found: VecDeque<(ChunkIndex, u32)>,
    /// The last page was seen.
    ended: bool,
}

impl RowsWalk {
    pub(super) fn new(set: SetIndex, members: &[MemberId], floor: Version) -> RowsWalk {
        RowsWalk {
            set,
            floor,
            from: ChunkIndex(0),
            pages: members
                .iter()
                .map(|member| Page {
                    member: *member,
                    query: None,
                    rows: None,
                })
                .collect(),
            found: VecDeque::new(),
            ended: false,
        }
    }

    /// On whom.
    pub(super) fn members(&self) -> impl Iterator<Item = MemberId> {
        self.pages.iter().map(|page| page.member)
    }

    /// Nothing is left to be looked at.
    pub(super) fn is_done(&self) -> bool {
        self.ended && self.found.is_empty()
    }

    /// What is to be asked now.
    fn questions(&self) -> SmallVec<[MemberId; 4]> {
        if self.ended || !self.found.is_empty() {
            return SmallVec::new();
        }
        self.pages
            .iter()
            .filter(|page| page.query.is_none() && page.rows.is_none())
            .map(|page| page.member)
            .collect()
    }

    fn take(&mut self, query: QueryId, rows: Rows) {
        for page in &mut self.pages {
            if page.query == Some(query) {
                page.query = None;
                page.rows = Some(rows);
                break;
            }
        }
        if self.pages.iter().any(|page| page.rows.is_none()) {
            return;
        }
        // Up to where every page reaches.
        let end = self
            .pages
            .iter()
            .filter_map(|page| page.rows.as_ref().filter(|rows| rows.more))
            .filter_map(|rows| rows.rows.last().map(|row| row.chunk))
            .min();
        let mut leaves: Vec<(ChunkIndex, u32)> = self
            .pages
            .iter()
            .filter_map(|page| page.rows.as_ref())
            .flat_map(|rows| &rows.rows)
            .filter(|row| end.is_none_or(|end| row.chunk <= end))
            .flat_map(|row| self.leaves_of(row))
            .collect();
        leaves.sort_unstable();
        leaves.dedup();
        self.found.extend(leaves);
        for page in &mut self.pages {
            page.rows = None;
        }
        match end.and_then(|end| end.0.checked_add(1)) {
            Some(next) => self.from = ChunkIndex(next),
            None => self.ended = true,
        }
    }

    fn leaves_of(&self, row: &RowVersions) -> SmallVec<[(ChunkIndex, u32); CHUNK_LEAVES as usize]> {
        (0..)
            .zip(&row.leaves)
            .filter(|(_, version)| **version != Version::NONE && **version >= self.floor)
            .map(|(leaf, _)| (row.chunk, leaf))
            .collect()
    }
}

impl ReplicatedHead {
    fn walk(&mut self, of: RowsOf) -> Option<&mut RowsWalk> {
        match of {
            RowsOf::Reconcile => self.opening_reconcile().walk.as_mut(),
            RowsOf::Resync(member) => self.resync_of(member)?.walk.as_mut(),
        }
    }

    /// Asks for the next page, if one is due.
    pub(super) fn go_on_walking(&mut self, of: RowsOf, actions: &mut Vec<Action>) {
        let Some(walk) = self.walk(of) else { return };
        let (set, from, floor) = (walk.set, walk.from, walk.floor);
        for member in walk.questions() {
            let query = self.ask(member, Purpose::Rows(of));
            if let Some(walk) = self.walk(of) {
                for page in walk.pages.iter_mut().filter(|page| page.member == member) {
                    page.query = Some(query);
                }
            }
            actions.push(Action::ReadRows {
                query,
                member,
                set,
                from,
                floor,
            });
        }
    }

    pub(super) fn on_rows(
        &mut self,
        query: QueryId,
        result: Result<Rows, Status>,
        actions: &mut Vec<Action>,
    ) {
        let Some(asked) = self.queries.remove(&query) else {
            return;
        };
        match (asked.purpose, result) {
            (Purpose::Rows(of), Ok(rows)) => {
                if let Some(walk) = self.walk(of) {
                    walk.take(query, rows);
                }
            }
            (_, Ok(_)) => {}
            (_, Err(status)) => self.lose(asked.member, Some(status), actions),
        }
    }
}
