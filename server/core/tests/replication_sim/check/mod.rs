//! One file for each promise, named as docs/replication.md has it.

pub(crate) mod everything_heals;
pub(crate) mod flushed_survives_power_loss;
pub(crate) mod no_answered_write_is_lost;
pub(crate) mod reads_never_go_back;
pub(crate) mod replicas_are_identical;
pub(crate) mod unanswered_writes_are_decided_once;
pub(crate) mod zeros_stay_zeros;

/// A promise that was broken.
#[derive(Clone, Debug)]
pub(crate) struct Violation {
    pub(crate) promise: &'static str,
    pub(crate) what: String,
}
