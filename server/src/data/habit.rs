//! Whether something that may pay is worth trying, as learnt from what came of it lately.

/// With trying found not to pay, one chance in so many is taken all the same, unless it is said otherwise.
const TRY_AGAIN: u32 = 64;
/// Weight of one outcome: an average over about the last 16.
const AVERAGE_SHIFT: u32 = 4;
const ONE: u32 = 1 << 16;

/// See the module text.
#[derive(Debug)]
pub(super) struct Habit {
    /// How often it paid lately, of [`ONE`].
    pays: u32,
    passed_over: u32,
    try_again: u32,
}

impl Default for Habit {
    fn default() -> Habit {
        Habit::trying_again(TRY_AGAIN)
    }
}

impl Habit {
    /// That takes one chance in so many though it has been found not to pay.
    pub(super) fn trying_again(try_again: u32) -> Habit {
        Habit {
            pays: ONE / 2,
            passed_over: 0,
            try_again,
        }
    }

    /// Whether it pays more often than not.
    #[inline]
    pub(super) fn pays(&self) -> bool {
        self.pays >= ONE / 2
    }

    /// Whether to try this time: as long as it pays, and otherwise only now and then, to see whether it has begun to.
    #[inline]
    pub(super) fn tries(&mut self) -> bool {
        if !self.pays() {
            self.passed_over += 1;
            if self.passed_over < self.try_again {
                return false;
            }
            self.passed_over = 0;
        }
        true
    }

    /// What came of trying.
    #[inline]
    pub(super) fn learn(&mut self, paid: bool) {
        let target = if paid { ONE } else { 0 };
        self.pays = self.pays - (self.pays >> AVERAGE_SHIFT) + (target >> AVERAGE_SHIFT);
    }
}
