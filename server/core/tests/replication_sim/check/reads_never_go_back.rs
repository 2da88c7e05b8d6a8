//! What was read once is read from then on, or a newer value, as long as the client's session lasts.

use super::Violation;
use crate::client::{Floor, History};
use crate::disk::Content;

pub(crate) fn check(history: &History, floor: Floor, content: Content) -> Result<(), Violation> {
    match history.number_of(content, floor.read) {
        Some(number) if number < floor.read => Err(Violation {
            promise: "reads_never_go_back",
            what: format!(
                "block {:?} has value {number}, and {} had been read",
                history.at, floor.read
            ),
        }),
        _ => Ok(()),
    }
}
