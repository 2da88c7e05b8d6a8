//! Whether to look again for requests before going to sleep.
//!
//! A client that was just answered often sends its next request within microseconds. Going to sleep and being woken
//! costs more processor time than looking again for that long, and the client waits for the waking. A client that
//! thinks longer, or a reply that a disk must give first, makes looking a waste. So the thread learns: it looks again
//! as long as that pays more often than not, and otherwise only now and then, to see whether it has begun to pay.
//! What was sent tells much about what comes back, so that each kind has a habit of its own. That a look finds something
//! does not say that the client is better served by it: see [`super::contest`].

use std::time::{Duration, Instant};

use super::contest::Contest;
use super::habit::Habit;

/// Who gave way to others and is back sooner found nobody.
const NOBODY_ELSE: Duration = Duration::from_micros(3);
/// A look that others kept from the processor for longer than this ends: who sleeps is woken in the middle of their work,
/// who gave way is not.
pub(super) const OTHERS_SHARE: Duration = Duration::from_micros(300);
/// Longer than any client takes to go through a batch of answers and to ask for more.
pub(super) const CLIENTS_SHARE: Duration = Duration::from_millis(1);

/// What was sent last, as far as it tells how soon something comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// Answers in a turn in which a disk ended something.
    FromDisk,
    /// The last reads that the disks had, and many: they stand still until a client comes back for more. A kernel that keeps work on few processors while there is room has put that client on ours when we
    /// slept, and finds room for it elsewhere when we do not.
    DiskBatch,
    /// One answer from memory: its client waits for nothing else. Both sides of such a client's every operation are
    /// wake-ups, and on an otherwise idle processor each costs as much as a long look.
    Alone,
    /// Several answers from memory: their clients are busy with sending, and lose little by our sleep.
    Several,
    /// Messages to stores elsewhere or to heads: each operation is a chain of them.
    OnLinks,
    /// Nothing, but one of several copies has answered: the others should follow.
    PartOfLinks,
    /// Answers that came by links.
    ThroughLinks,
}

impl Sent {
    const ALL: [Sent; 7] = [
        Sent::FromDisk,
        Sent::DiskBatch,
        Sent::Alone,
        Sent::Several,
        Sent::OnLinks,
        Sent::PartOfLinks,
        Sent::ThroughLinks,
    ];

    /// How much longer than a wake-up takes it is looked for.
    fn patience(self) -> u32 {
        match self {
            Sent::FromDisk | Sent::Several => 1,
            Sent::Alone | Sent::OnLinks | Sent::PartOfLinks | Sent::ThroughLinks => 5,
            Sent::DiskBatch => 15,
        }
    }

    /// Whether others may have the processor between two looks: the other end of a link may be waiting for this one.
    pub(super) fn yields(self) -> bool {
        matches!(self, Sent::OnLinks | Sent::PartOfLinks | Sent::ThroughLinks)
    }

    /// Whether sleep may be better though a look finds something. Not where others have the processor between two looks, nor
    /// where the look is there for what it does to the client.
    fn is_contested(self) -> bool {
        matches!(self, Sent::FromDisk | Sent::Alone | Sent::Several)
    }

    /// Whether the look is there to drive the client off this processor: then it has not failed as long as it is there.
    pub(super) fn drives_off(self) -> bool {
        self == Sent::DiskBatch
    }
}

/// What one thread has learnt.
#[derive(Debug)]
pub(super) struct Spins {
    habits: [Spin; Sent::ALL.len()],
    /// Whether a look that finds something is better than sleep.
    contests: [Contest; Sent::ALL.len()],
}

impl Spins {
    /// `wake_up`: what going to sleep and being woken costs; zero turns all of this off.
    pub(super) fn new(wake_up: Duration) -> Spins {
        let now = Instant::now();
        let contests = Sent::ALL.map(|_| Contest::new(now));
        let habits = Sent::ALL.map(|sent| {
            let window = wake_up * sent.patience();
            if sent.drives_off() {
                return Spin::new(window, window, Habit::trying_again(BATCHES_PASSED_OVER));
            }
            // Beyond half the window a look has cost as much as it saves.
            Spin::new(window, window / 2, Habit::default())
        });
        Spins { habits, contests }
    }

    #[inline]
    pub(super) fn after(&mut self, sent: Sent) -> &mut Spin {
        &mut self.habits[sent as usize]
    }

    /// Until when to look after this was sent. `requests`: all that ever came.
    #[inline]
    pub(super) fn look_until(
        &mut self,
        sent: Sent,
        now: Instant,
        requests: u64,
    ) -> Option<Instant> {
        let spin = self.after(sent);
        let pays = spin.habit.pays();
        let until = spin.look_until(now)?;
        // What does not find anything is no rival of sleep; now and then it is to be seen whether it does again.
        if !pays || !sent.is_contested() {
            return Some(until);
        }
        let at = sent as usize;
        let mut others = self.contests.iter().enumerate();
        let may_try = !others.any(|(other, contest)| other != at && contest.is_tried(now));
        self.contests[at]
            .looks(now, requests, may_try)
            .then_some(until)
    }
}

/// Looks that kept a client off this processor and did not drive it away, until there is no hope in them.
const DRIVES: u32 = 32;
/// Then there is none after so many batches: a client and a thread with one processor between them lose a hundredth.
const REST: u32 = 1024;
/// A batch is many answers: looking after it is tried this much sooner again than after one.
const BATCHES_PASSED_OVER: u32 = 8;

/// One habit, see the module text.
#[derive(Debug)]
pub(super) struct Spin {
    /// Longest look.
    window: Duration,
    /// It pays if it finds something within this.
    pays_within: Duration,
    habit: Habit,
    /// How often it has kept a client off this processor in vain.
    in_vain: u32,
    resting: u32,
}

impl Spin {
    fn new(window: Duration, pays_within: Duration, habit: Habit) -> Spin {
        Spin {
            window,
            pays_within,
            habit,
            in_vain: 0,
            resting: 0,
        }
    }

    /// Until when to look, after replies were sent at `now`.
    #[inline]
    pub(super) fn look_until(&mut self, now: Instant) -> Option<Instant> {
        if self.resting > 0 {
            self.resting -= 1;
            return None;
        }
        (!self.window.is_zero() && self.habit.tries()).then(|| now + self.window)
    }

    /// What came of looking: something after so long, or nothing.
    #[inline]
    pub(super) fn learn(&mut self, found_after: Option<Duration>) {
        let pays = found_after.is_some_and(|after| after <= self.pays_within);
        if pays {
            self.in_vain = self.in_vain.saturating_sub(DRIVES / 4);
        }
        self.habit.learn(pays);
    }

    /// It found nothing, and the client waited meanwhile for this processor: the next may drive it off.
    pub(super) fn kept_client(&mut self) {
        self.in_vain += 1;
        if self.in_vain == DRIVES {
            self.in_vain = 0;
            self.resting = REST;
        }
    }
}

/// Lets others have the processor, and answers for how long they had it.
pub(super) fn give_way() -> Duration {
    let begun = Instant::now();
    std::thread::yield_now();
    let away = begun.elapsed();
    if away < NOBODY_ELSE {
        Duration::ZERO
    } else {
        away
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_while_that_pays_and_seldom_otherwise() {
        let now = Instant::now();
        assert_eq!(
            Spins::new(Duration::ZERO)
                .after(Sent::Alone)
                .look_until(now),
            None
        );
        let window = Duration::from_micros(20);
        let mut spin = Spin::new(window, window / 2, Habit::default());
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

    #[test]
    fn each_kind_of_answer_has_its_own_window_and_habit() {
        let now = Instant::now();
        let us = Duration::from_micros;
        let mut spins = Spins::new(us(20));
        let windows = [20, 300, 100, 20, 100, 100, 100].map(|window| Some(now + us(window)));
        assert_eq!(
            Sent::ALL.map(|sent| spins.after(sent).look_until(now)),
            windows
        );
        // A look after a batch pays whenever it finds something, others only while that is early.
        for sent in Sent::ALL {
            for _ in 0..100 {
                spins.after(sent).learn(Some(us(90)));
            }
        }
        let looks = Sent::ALL.map(|sent| spins.after(sent).look_until(now).is_some());
        assert_eq!(looks, [false, true, false, false, false, false, false]);
    }

    #[test]
    fn where_sleep_is_better_a_look_is_still_tried_once_it_had_stopped_paying() {
        let mut now = Instant::now();
        let mut spins = Spins::new(Duration::from_micros(20));
        // The looks in so many turns of one request each, which takes so long with and without.
        let mut looks = |spins: &mut Spins, turns: u64, finds: bool, looking: u64, asleep: u64| {
            let mut looked = 0;
            for request in 0..turns {
                let looks = spins.look_until(Sent::FromDisk, now, request).is_some();
                if looks {
                    looked += 1;
                    let found = finds.then_some(Duration::from_micros(5));
                    spins.after(Sent::FromDisk).learn(found);
                }
                now += Duration::from_micros(if looks { looking } else { asleep });
            }
            looked
        };
        looks(&mut spins, 1000, true, 90, 75);
        assert!(looks(&mut spins, 2000, true, 90, 75) < 200);
        // A client that thinks for long, and then one that does not, for which looking is better.
        looks(&mut spins, 50_000, false, 90, 90);
        assert!(looks(&mut spins, 6400, false, 90, 90) >= 100);
        looks(&mut spins, 30_000, true, 25, 50);
        assert!(looks(&mut spins, 1000, true, 25, 50) > 700);
    }

    #[test]
    fn driving_a_client_off_in_vain_is_given_up_for_a_while() {
        let now = Instant::now();
        let mut spins = Spins::new(Duration::from_micros(20));
        let spin = spins.after(Sent::DiskBatch);
        let mut looks = 0;
        for _ in 0..10 * (DRIVES + REST) {
            if spin.look_until(now).is_some() {
                looks += 1;
                spin.kept_client();
            }
        }
        assert_eq!(looks, 10 * DRIVES);
        // Where it mostly succeeds it goes on.
        for turn in 0..1000 {
            assert!(spin.look_until(now).is_some(), "{turn}");
            if turn % 4 == 0 {
                spin.kept_client();
            } else {
                spin.learn(Some(Duration::from_micros(150)));
            }
        }
    }
}
