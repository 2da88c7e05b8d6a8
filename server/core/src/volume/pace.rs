//! How fast a volume's requests may come: a bucket for operations and one for bytes.
//!
//! Each bucket is one number, the moment until which what was let through has been paid for at the bucket's rate. A
//! request is let through while that moment is at most [`BURST_NS`] away, and then moves it on by its whole cost. So the
//! long-run rate is exact, a request of any size gets through, and what is let through ahead of the rate is bounded by
//! the burst and one request. No clock: times are nanoseconds that the caller counts.

/// What may come at once: a tenth of a second's worth.
const BURST_NS: u64 = 100_000_000;
/// A request that has to wait is looked at again when this much of the burst is free: often enough to be smooth, and
/// not once for every request of a fast volume.
const SLICE_NS: u64 = 1_000_000;
const SECOND_NS: u64 = 1_000_000_000;

/// One rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bucket {
    per_second: u64,
    /// Everything let through is paid for at this moment.
    paid_at_ns: u64,
}

impl Bucket {
    fn new(per_second: u64) -> Bucket {
        assert!(per_second > 0, "a rate of nothing lets nothing through");
        Bucket {
            per_second,
            paid_at_ns: 0,
        }
    }

    fn waits_until(&self, now_ns: u64) -> Option<u64> {
        let from = self.paid_at_ns.saturating_sub(BURST_NS);
        (from > now_ns).then_some(from + SLICE_NS)
    }

    fn take(&mut self, now_ns: u64, amount: u64) {
        let cost = u128::from(amount) * u128::from(SECOND_NS);
        let cost = cost.div_ceil(u128::from(self.per_second));
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        self.paid_at_ns = self.paid_at_ns.max(now_ns).saturating_add(cost);
    }
}

/// The pace of one volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Pace {
    /// Operations and bytes a second; `None`: not bounded. Starts with the whole burst free.
    ///
    /// # Panics
    /// When a rate is zero.
    pub fn new(operations_per_second: Option<u64>, bytes_per_second: Option<u64>) -> Pace {
        Pace {
            operations: operations_per_second.map(Bucket::new),
            bytes: bytes_per_second.map(Bucket::new),
        }
    }

    /// Changes the rates. What was let through before is forgiven: a new rate begins with a burst.
    pub fn set(&mut self, operations_per_second: Option<u64>, bytes_per_second: Option<u64>) {
        *self = Pace::new(operations_per_second, bytes_per_second);
    }

    /// Nothing is bounded.
    pub fn is_free(&self) -> bool {
        self.operations.is_none() && self.bytes.is_none()
    }

    /// When the next request should ask again; `None`: it may come now.
    pub fn waits_until(&self, now_ns: u64) -> Option<u64> {
        let wait = |bucket: &Option<Bucket>| bucket.as_ref().and_then(|b| b.waits_until(now_ns));
        wait(&self.operations).max(wait(&self.bytes))
    }

    /// A request was let through.
    pub fn take(&mut self, now_ns: u64, bytes: u64) {
        if let Some(operations) = &mut self.operations {
            operations.take(now_ns, 1);
        }
        if let Some(bucket) = &mut self.bytes
            && bytes > 0
        {
            bucket.take(now_ns, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sends requests of these sizes as fast as they are let through; answers when the last one was.
    fn run(pace: &mut Pace, sizes: impl IntoIterator<Item = u64>) -> u64 {
        let mut now = 0;
        for bytes in sizes {
            while let Some(until) = pace.waits_until(now) {
                assert!(until > now, "a wait that does not end");
                now = until;
            }
            pace.take(now, bytes);
        }
        now
    }

    #[test]
    fn operations_come_at_their_rate_after_a_burst() {
        let mut pace = Pace::new(Some(1000), None);
        // 100 at once and one more, then 1000 a second.
        assert_eq!(run(&mut pace, std::iter::repeat_n(1 << 30, 101)), 0);
        let took = run(
            &mut Pace::new(Some(1000), None),
            std::iter::repeat_n(0, 10_101),
        );
        assert!((9_990_000_000..=10_010_000_000).contains(&took), "{took}");
    }

    #[test]
    fn bytes_come_at_their_rate_whatever_the_requests() {
        for size in [512u64, 4096, 1 << 20, 32 << 20] {
            let rate = 64 << 20;
            let count = (1 << 30) / size;
            let took = run(
                &mut Pace::new(None, Some(rate)),
                std::iter::repeat_n(size, count as usize),
            );
            let exact = (1u64 << 30) * SECOND_NS / rate;
            let ahead = BURST_NS + size * SECOND_NS / rate + SLICE_NS;
            assert!(
                took <= exact + SLICE_NS && took + ahead >= exact,
                "{size}: {took} of {exact}"
            );
        }
    }

    #[test]
    fn the_smaller_bound_rules_and_idleness_saves_no_more_than_a_burst() {
        let mut pace = Pace::new(Some(10), Some(1 << 40));
        assert!(run(&mut pace, std::iter::repeat_n(4096, 12)) >= 900_000_000);
        let later = 3600 * SECOND_NS;
        let mut come = 0;
        while pace.waits_until(later).is_none() {
            pace.take(later, 4096);
            come += 1;
        }
        assert_eq!(come, 2, "one in the burst, and the one that overdraws it");
        assert!(Pace::default().is_free() && Pace::default().waits_until(0).is_none());
    }

    proptest! {
        #[test]
        fn never_faster_than_rate_burst_and_one_request(
            iops in 10u64..1_000_000,
            rate in (1u64 << 20)..(10 << 30),
            sizes in prop::collection::vec(0u64..(32 << 20), 1..200),
        ) {
            let mut pace = Pace::new(Some(iops), Some(rate));
            let last = *sizes.last().expect("one at least");
            let total: u64 = sizes.iter().sum();
            let took = run(&mut pace, sizes.iter().copied());
            // All but the last request had to fit into the time and the burst.
            let allowed = u128::from(rate) * u128::from(took + BURST_NS) / u128::from(SECOND_NS);
            let before = u128::from(total - last);
            let largest = u128::from(sizes.iter().copied().max().unwrap_or(0));
            prop_assert!(before <= allowed + largest);
            let count = sizes.len() as u128 - 1;
            prop_assert!(count <= u128::from(iops) * u128::from(took + BURST_NS) / u128::from(SECOND_NS) + 1);
        }
    }
}
