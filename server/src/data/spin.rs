//! Whether to look again for requests before going to sleep.
//!
//! A client that was just answered often sends its next request within microseconds. Going to sleep and being woken
//! costs more processor time than looking again for that long, and the client waits for the waking. A client that
//! thinks longer, or a reply that a disk must give first, makes looking a waste. So the thread learns: it looks again
//! as long as that pays more often than not, and otherwise only now and then, to see whether it has begun to pay.

use std::time::{Duration, Instant};

use super::habit::Habit;

/// See the module text.
#[derive(Debug)]
pub(super) struct Spin {
    /// Longest look; zero turns all of this off.
    window: Duration,
    habit: Habit,
}

impl Spin {
    pub(super) fn new(window: Duration) -> Spin {
        Spin {
            window,
            habit: Habit::default(),
        }
    }

    /// Until when to look, after replies were sent at `now`.
    #[inline]
    pub(super) fn look_until(&mut self, now: Instant) -> Option<Instant> {
        (!self.window.is_zero() && self.habit.tries()).then(|| now + self.window)
    }

    /// What came of looking: something after so long, or nothing.
    #[inline]
    pub(super) fn learn(&mut self, found_after: Option<Duration>) {
        // Beyond half the window it has cost as much as it saves.
        self.habit
            .learn(found_after.is_some_and(|after| after <= self.window / 2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_while_that_pays_and_seldom_otherwise() {
        let now = Instant::now();
        assert_eq!(Spin::new(Duration::ZERO).look_until(now), None);
        let window = Duration::from_micros(20);
        let mut spin = Spin::new(window);
        for _ in 0..100 {
            assert_eq!(spin.look_until(now), Some(now + window));
            spin.learn(Some(Duration::from_micros(5)));
        }
        let mut looks = 0;
        for _ in 0..6400 {
            if spin.look_until(now).is_some() {
                looks += 1;
                spin.learn(if looks % 2 == 0 { None } else { Some(window) });
            }
        }
        assert!((100..130).contains(&looks), "{looks}");
        for _ in 0..64 * 20 {
            if spin.look_until(now).is_some() {
                spin.learn(Some(Duration::from_micros(1)));
            }
        }
        assert!(spin.look_until(now).is_some() && spin.look_until(now).is_some());
    }
}
