//! Waiting for a condition, with a deadline.

use std::time::{Duration, Instant};

/// How often a condition that cannot announce itself (a file of another process, a counter behind http) is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Looks until `condition` gives something, or panics after `limit` with what was waited for and the last word of
/// `condition` about why not.
pub fn until<T>(
    limit: Duration,
    what: &str,
    mut condition: impl FnMut() -> Result<T, String>,
) -> T {
    let start = Instant::now();
    loop {
        match condition() {
            Ok(value) => return value,
            Err(why) if start.elapsed() >= limit => panic!("{what}: not within {limit:?}: {why}"),
            Err(_) => std::thread::sleep(LOOK_EVERY),
        }
    }
}

/// Lets time pass where the time is the point: a rate, a random moment, a span to measure over. Never to let something
/// else happen first.
pub fn pass(time: Duration) {
    std::thread::sleep(time);
}
