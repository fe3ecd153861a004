//! Random numbers from a seed, the same for every backend.

/// xorshift64*: fast, and good enough to choose blocks.
#[derive(Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        // A state of zero would stay zero; the multiplication spreads seeds that are near each other.
        Rng((seed ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        // The high half of the product: no division, and an error that nobody can measure.
        u64::try_from((u128::from(self.next()) * u128::from(end)) >> 64).unwrap_or(0)
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }

    /// The turns of so many contenders in a round: a storage that hands out bandwidth in periods would favour a place in an
    /// order that is always the same.
    pub(crate) fn turns(contenders: usize, round: usize) -> Vec<usize> {
        let mut turns: Vec<usize> = (0..contenders).collect();
        Rng::new(round as u64).shuffle(&mut turns);
        turns
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
    }
}
