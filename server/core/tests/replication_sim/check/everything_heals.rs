//! When faults end, the volume is served again, every replica comes back in sync, and every request ends.

use super::Violation;

pub(crate) fn check(is_healed: bool, state: impl FnOnce() -> String) -> Result<(), Violation> {
    if is_healed {
        return Ok(());
    }
    Err(Violation {
        promise: "everything_heals",
        what: state(),
    })
}
