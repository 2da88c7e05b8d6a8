//! A write that was answered is read from then on, or a newer one, as long as the client's session lasts.

use super::Violation;
use crate::client::{Floor, History};
use crate::disk::Content;

pub(crate) fn check(history: &History, floor: Floor, content: Content) -> Result<(), Violation> {
    match history.number_of(content, floor.answered) {
        Some(number) if number < floor.answered => Err(Violation {
            promise: "no_answered_write_is_lost",
            what: format!(
                "block {:?} has value {number}, and the write of {} was answered",
                history.at, floor.answered
            ),
        }),
        _ => Ok(()),
    }
}
