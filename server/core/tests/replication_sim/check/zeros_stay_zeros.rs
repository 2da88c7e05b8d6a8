//! A block holds what was written to it and nothing else: zeros where nothing was, never another block's bytes.

use super::Violation;
use crate::client::History;
use crate::disk::Content;

pub(crate) fn check(history: &History, content: Content) -> Result<(), Violation> {
    if history.contents.contains(&content) {
        return Ok(());
    }
    Err(Violation {
        promise: "zeros_stay_zeros",
        what: format!(
            "block {:?} has content {content:#x}, which was never written there",
            history.at
        ),
    })
}
