//! A write that was not answered happened or did not; once everything is quiet, every read says the same.

use super::Violation;
use crate::client::History;
use crate::disk::Content;

pub(crate) fn check(history: &History, reads: &[Content]) -> Result<(), Violation> {
    if reads.windows(2).all(|two| two[0] == two[1]) {
        return Ok(());
    }
    Err(Violation {
        promise: "unanswered_writes_are_decided_once",
        what: format!(
            "block {:?} reads as {reads:x?} with nothing writing",
            history.at
        ),
    })
}
