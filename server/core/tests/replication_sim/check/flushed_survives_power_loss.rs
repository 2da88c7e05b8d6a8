//! What was answered before a flush that was answered is there for ever, whoever loses power.

use super::Violation;
use crate::client::{Floor, History};
use crate::disk::Content;

pub(crate) fn check(history: &History, floor: Floor, content: Content) -> Result<(), Violation> {
    match history.number_of(content, floor.flushed) {
        Some(number) if number < floor.flushed => Err(Violation {
            promise: "flushed_survives_power_loss",
            what: format!(
                "block {:?} has value {number}, and {} had been flushed",
                history.at, floor.flushed
            ),
        }),
        _ => Ok(()),
    }
}
