//! What goes into a head and what comes out.

use smallvec::SmallVec;

use super::super::wire::{LeafStates, Rows, Status};
use crate::records::{SetIndex, Transaction, Versioned, VolumeRecord};
use crate::store::ExtentKey;
use crate::units::{ChunkIndex, Epoch, Version};

/// A store that has, or is to have, replicas of the volume; a small number that means the same store as long as the
/// head lives. [`super::ReplicatedHead::member`] says which it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberId(pub u8);

/// Replicas of one set, by their place in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplicaMask(pub u8);

impl ReplicaMask {
    /// The places in the mask, ascending.
    #[inline]
    pub fn places(self) -> impl Iterator<Item = usize> {
        let mut bits = self.0;
        std::iter::from_fn(move || {
            let place = bits.trailing_zeros() as usize;
            bits &= bits.wrapping_sub(1);
            (place < 8).then_some(place)
        })
    }
}

/// A change or a flush under way. Never used twice, so an answer that comes late is known as such.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpKey(pub u64);

/// A question to a member, or a `Whole` or `Flush` of the head's own; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueryId(pub u64);

/// A copy of blocks from one member to others; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CopyId(pub u64);

/// How a compare-and-swap went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SwapOutcome {
    /// It happened; the record is now of this revision.
    Done(crate::records::Revision),
    /// The record had been changed by somebody else. Nothing happened.
    Conflict,
    /// Nobody knows whether it happened.
    Unknown,
}

/// What happens to a head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The volume's record: the answer to [`Action::ReadRecord`] (`asked`), or what a watch saw. `None`: it is gone.
    /// An answer must have been read from the store after the question was asked.
    Record {
        /// It answers a question.
        asked: bool,
        /// What was read.
        record: Option<Box<Versioned<VolumeRecord>>>,
    },
    /// [`Action::Swap`] ended.
    Swapped {
        /// Its serial.
        serial: u64,
        /// How.
        outcome: SwapOutcome,
    },
    /// A link to a member that was asked for is there.
    LinkUp {
        /// Which.
        member: MemberId,
    },
    /// The link to a member broke, and every session on it with it. No answer that was sent on it is reported later.
    LinkDown {
        /// Which.
        member: MemberId,
    },
    /// A member answered [`Action::Open`]: it is sealed.
    Opened {
        /// Which.
        member: MemberId,
        /// The opening answered.
        opening: u64,
        /// When the opening was sent.
        sent_at_us: u64,
        /// It lacks writes that it had answered.
        lost_power: bool,
    },
    /// A member refused [`Action::Open`].
    OpenRefused {
        /// Which.
        member: MemberId,
        /// The opening answered.
        opening: u64,
        /// Why.
        status: Status,
        /// What it is sealed at.
        epoch: Epoch,
    },
    /// A member was sealed by another head.
    Fenced {
        /// Which.
        member: MemberId,
        /// By which epoch.
        epoch: Epoch,
    },
    /// A link gave a sign of life. Call it for every volume with a session on the link, after everything that came on
    /// the link before it.
    Alive {
        /// Which.
        member: MemberId,
        /// When the question was sent (not when the answer came), by the clock that is used for `now`.
        sent_at_us: u64,
    },
    /// [`Action::ReadRows`] was answered.
    Rows {
        /// Which question.
        query: QueryId,
        /// The rows.
        result: Result<Rows, Status>,
    },
    /// [`Action::ReadLeaf`] was answered.
    Leaf {
        /// Which question.
        query: QueryId,
        /// The states.
        result: Result<LeafStates, Status>,
    },
    /// [`Action::Flush`], [`Action::Whole`] or a clean [`Action::CloseSession`] was answered.
    Done {
        /// Which question.
        query: QueryId,
        /// How.
        status: Status,
    },
    /// [`Action::CopyRead`] ended; the blocks are held for the `CopyWrite`s to come.
    CopyRead {
        /// Which copy.
        copy: CopyId,
        /// How.
        status: Status,
    },
    /// [`Action::CopyWrite`] ended at one member.
    CopyWritten {
        /// Which copy.
        copy: CopyId,
        /// Which member.
        member: MemberId,
        /// How.
        status: Status,
    },
}

/// What the shell must do. None of it waits for another unless said so; per member, everything goes out in the order in
/// which it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read the volume's record from the metadata store (not from a watch), retry until it can be read, and report
    /// [`Event::Record`] with `asked`.
    ReadRecord,
    /// Carry out a compare-and-swap of the volume's record, once, and report [`Event::Swapped`].
    Swap {
        /// Comes back.
        serial: u64,
        /// What to do.
        transaction: Transaction,
    },
    /// A link to this member is wanted from now on; retry until it is there. Of a local member, report
    /// [`Event::LinkUp`] when its store is usable.
    Connect {
        /// Which.
        member: MemberId,
    },
    /// The link is no longer wanted by this volume.
    Disconnect {
        /// Which.
        member: MemberId,
    },
    /// Open a session. What the member answers on an earlier session of this volume is not reported any more.
    Open {
        /// Which.
        member: MemberId,
        /// The epoch to seal.
        epoch: Epoch,
        /// Comes back, and goes into the message.
        opening: u64,
        /// It will be brought up to date.
        resync: bool,
    },
    /// End the session: tell the member if it can be told, and report nothing that comes on it later. With `query`, it
    /// is a clean end, to be answered by [`Event::Done`].
    CloseSession {
        /// Which.
        member: MemberId,
        /// Of a clean end.
        query: Option<QueryId>,
    },
    /// Ask for rows of a set's chunks from `from` on.
    ReadRows {
        /// Comes back.
        query: QueryId,
        /// Whom.
        member: MemberId,
        /// Of which set.
        set: SetIndex,
        /// First chunk.
        from: ChunkIndex,
        /// Rows with every version below it are left out.
        floor: Version,
    },
    /// Ask for the block states of a leaf.
    ReadLeaf {
        /// Comes back.
        query: QueryId,
        /// Whom.
        member: MemberId,
        /// Which chunk.
        extent: ExtentKey,
        /// Which leaf of it.
        leaf: u32,
    },
    /// Make everything that the member answered durable; not a client's flush.
    Flush {
        /// Comes back.
        query: QueryId,
        /// Whom.
        member: MemberId,
    },
    /// Tell the member that it is whole.
    Whole {
        /// Comes back.
        query: QueryId,
        /// Whom.
        member: MemberId,
    },
    /// Read blocks from a member and hold them. At most [`super::super::wire::MAX_MESSAGE_BLOCKS`].
    CopyRead {
        /// Comes back.
        copy: CopyId,
        /// From whom.
        member: MemberId,
        /// Which chunk.
        extent: ExtentKey,
        /// First block.
        first_block: u32,
        /// How many.
        count: u32,
    },
    /// Write the held blocks to a member with this version; or zeros, if `zeros` (then nothing was read).
    CopyWrite {
        /// Comes back.
        copy: CopyId,
        /// To whom.
        member: MemberId,
        /// Which chunk.
        extent: ExtentKey,
        /// First block.
        first_block: u32,
        /// How many.
        count: u32,
        /// The version they get there.
        version: Version,
        /// A zero entry, not data.
        zeros: bool,
    },
    /// The copy is at its end, well or not; its blocks need not be held, and nothing more is reported of it.
    CopyEnd {
        /// Which.
        copy: CopyId,
    },
    /// Everything that was told to wait may be asked again: [`super::ReplicatedHead::admit_write`],
    /// [`super::ReplicatedHead::admit_read`] and [`super::ReplicatedHead::begin_flush`].
    Retry,
    /// A change that was held is done: answer the client.
    Acknowledge {
        /// The caller's name for it.
        tag: u64,
    },
    /// A change is undecided and the copies were made alike without asking it: ask
    /// [`super::ReplicatedHead::admit_write`] again, with the same bytes and the new version. The range stays locked.
    Redo {
        /// The caller's name for it.
        tag: u64,
        /// Its new version.
        version: Version,
    },
    /// A change failed and left nothing behind: answer the client with the error.
    Fail {
        /// The caller's name for it.
        tag: u64,
        /// Why.
        status: Status,
    },
    /// A flush is done.
    Flushed {
        /// The caller's name for it.
        tag: u64,
    },
    /// A flush has to be asked again by [`super::ReplicatedHead::begin_flush`], after the next `Retry`.
    FlushAgain {
        /// The caller's name for it.
        tag: u64,
    },
    /// Client requests that a resync had kept waiting may start, as those of
    /// [`super::ReplicatedHead::finish`] may.
    Started(crate::volume::Started),
    /// The volume is served: clients may be let in, with this generation.
    Serving {
        /// See [`VolumeRecord::client_generation`].
        client_generation: u64,
    },
    /// Acknowledged writes may be gone because every copy of a set lost power. Close every client connection that was
    /// made under a smaller generation, and let none of these clients back in as if nothing had happened. Before
    /// anything that was told to wait is answered.
    EndSessions {
        /// Connections from this generation on may stay.
        client_generation: u64,
    },
    /// The head is at its end: nothing it was asked will be answered. Fail what is under way, close connections, drop
    /// the machine.
    Stopped(StopReason),
    /// For people and counters.
    News(News),
}

/// Why a head stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StopReason {
    /// Another head claimed the volume.
    #[error("another head serves the volume, at epoch {}", epoch.0)]
    Fenced {
        /// Its epoch, or the smallest it can be.
        epoch: Epoch,
    },
    /// The volume is being deleted or is gone.
    #[error("the volume was deleted")]
    Deleted,
    /// No epoch is left.
    #[error("the volume has used up its epochs; copy it to a new volume")]
    EpochsExhausted,
    /// It was closed in order.
    #[error("closed")]
    Closed,
}

/// What people and counters should know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// A replica failed; acknowledgements are held until the record says that it is out.
    Failed {
        /// Which.
        member: MemberId,
        /// How; `None`: its link broke or it did not answer in time.
        status: Option<Status>,
    },
    /// The record says that a replica is out of sync.
    Dropped {
        /// Of which set.
        set: SetIndex,
        /// Which.
        member: MemberId,
    },
    /// A replica is being brought up to date.
    ResyncStarted {
        /// Of which set.
        set: SetIndex,
        /// Which.
        member: MemberId,
    },
    /// It did not come to its end, and is tried again.
    ResyncFailed {
        /// Of which set.
        set: SetIndex,
        /// Which.
        member: MemberId,
    },
    /// A replica is in sync again.
    Rejoined {
        /// Of which set.
        set: SetIndex,
        /// Which.
        member: MemberId,
        /// Blocks copied to it.
        copied_blocks: u64,
    },
    /// A replica that was wanted away is out of the record.
    Removed {
        /// Of which set.
        set: SetIndex,
        /// Which.
        member: MemberId,
    },
    /// A replica lost power while it was open for writing.
    LostPower {
        /// Which.
        member: MemberId,
    },
    /// Damaged blocks were written again from a good copy.
    Repaired {
        /// Where.
        extent: ExtentKey,
        /// The first of them.
        first_block: u32,
        /// How many: those between them may have been sound.
        count: u32,
    },
}

/// What becomes of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteAdmission {
    /// Send it to these replicas of the set; [`super::ReplicatedHead::replica`] names their members. Report each answer
    /// by [`super::ReplicatedHead::answered`].
    Send {
        /// Names it.
        op: OpKey,
        /// What to write it with: the one that was offered, or a newer one.
        version: Version,
        /// To whom.
        targets: ReplicaMask,
    },
    /// Not now: ask again after [`Action::Retry`]. Nothing was sent.
    Wait,
    /// Never: the head is at its end.
    Stopped,
}

/// What an answer means for the change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// More answers are awaited, or [`Action::Acknowledge`], [`Action::Redo`] or [`Action::Fail`] will follow.
    Pending,
    /// Done: answer the client. The value is the caller's name for it.
    Acknowledge(u64),
    /// Refused by every replica; nothing changed. The caller's name, and why.
    Fail(u64, Status),
}

/// Where a read goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadAdmission {
    /// To this replica of the set.
    From {
        /// Its member.
        member: MemberId,
        /// Its place in the set, for the mask of those tried.
        place: u8,
    },
    /// Not now: ask again after [`Action::Retry`], with no replica tried.
    Wait,
    /// Every copy was tried.
    Exhausted,
    /// Never: the head is at its end.
    Stopped,
}

/// Where a flush goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlushAdmission {
    /// To these members. Report each answer by [`super::ReplicatedHead::flush_answered`].
    Send {
        /// Names it.
        op: OpKey,
        /// To whom.
        members: SmallVec<[MemberId; 8]>,
    },
    /// Not now: ask again after [`Action::Retry`].
    Wait,
    /// Never: the head is at its end.
    Stopped,
}
