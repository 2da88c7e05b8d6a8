//! Randomness that can be replayed.

/// SplitMix64 (Steele, Lea and Flood, 2014): small, and every seed gives a good stream.
#[derive(Clone, Debug)]
pub struct Rng {
    state: u64,
}

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng { state: seed }
    }

    /// An independent stream, for instance one per thread.
    pub fn split(&mut self) -> Rng {
        Rng::new(self.next())
    }

    #[expect(
        clippy::should_implement_trait,
        reason = "an endless stream is not an iterator of options"
    )]
    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number in `0..bound`; `bound` is not zero. The bias of the remainder does not matter here.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A number in `range`.
    pub fn within(&mut self, range: std::ops::Range<u64>) -> u64 {
        range.start + self.below(range.end - range.start)
    }

    /// True `percent` times in a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of `choices`.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len() as u64) as usize]
    }

    /// A number in `1..=most`, small ones as likely as large ones (uniform in the logarithm).
    pub fn logarithmic(&mut self, most: u64) -> u64 {
        let bits = 64 - most.leading_zeros();
        let shift = self.below(u64::from(bits)) as u32;
        (1 << shift) + self.below(1 << shift).min(most - (1 << shift))
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            piece.copy_from_slice(&word[..piece.len()]);
        }
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.fill(&mut bytes);
        bytes
    }
}

/// The seed of this run: `ASHLAR_TESTS_SEED`, or a new one. It is printed, so that a failure names the seed to repeat it
/// with.
pub fn of_run(test: &str) -> u64 {
    let seed = match std::env::var("ASHLAR_TESTS_SEED") {
        Ok(text) => text.parse().expect("ASHLAR_TESTS_SEED is a number"),
        Err(_) => uuid::Uuid::new_v4().as_u64_pair().0,
    };
    println!("{test}: repeat with ASHLAR_TESTS_SEED={seed}");
    seed
}

#[cfg(test)]
mod tests {
    use super::Rng;

    #[test]
    fn logarithmic_stays_in_range() {
        let mut rng = Rng::new(1);
        for most in [1, 2, 3, 7, 8, 1000] {
            let drawn: Vec<u64> = (0..2000).map(|_| rng.logarithmic(most)).collect();
            assert!(drawn.iter().all(|n| (1..=most).contains(n)), "{most}");
            assert!(drawn.contains(&1) && drawn.iter().any(|n| *n * 2 > most));
        }
    }
}
