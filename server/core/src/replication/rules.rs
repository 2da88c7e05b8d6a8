//! The ten rules that carry replication, each with a switch. All are on; the simulator turns one off to see the
//! damage it prevents. docs/replication.md says what each is for.

/// Which rules are kept. Only a test that wants to see one fail changes this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// A write that a replica in sync did not take is answered only after the record says that it is out.
    pub drop_before_ack: bool,
    /// A read waits for a write of the same block that is under way.
    pub range_lock: bool,
    /// A replica that lost power while it was open for writing is not in sync.
    pub power_loss_is_out: bool,
    /// A new head makes all replicas in sync alike before it serves.
    pub reconcile: bool,
    /// A replica takes operations of the session it sealed last and of no other.
    pub epoch_check: bool,
    /// A new head that does not reach a replica in sync waits until the old head's reads have ended.
    pub lease_wait: bool,
    /// A returning replica is sealed before the first block of resync is looked at.
    pub seal_before_resync: bool,
    /// When every copy lost power, the clients that were connected are told.
    pub end_sessions: bool,
    /// A returning replica is flushed before it counts as in sync.
    pub flush_before_rejoin: bool,
    /// Nothing is read from a replica once it is being taken out of its set.
    pub departing_unread: bool,
}

impl Default for Rules {
    fn default() -> Rules {
        Rules {
            drop_before_ack: true,
            range_lock: true,
            power_loss_is_out: true,
            reconcile: true,
            epoch_check: true,
            lease_wait: true,
            seal_before_resync: true,
            end_sessions: true,
            flush_before_rejoin: true,
            departing_unread: true,
        }
    }
}
