//! Random choices that can be repeated, and how many of them.

/// A small generator.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() >> 16) as usize % n
    }

    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// A number from the environment, for longer runs.
pub(crate) fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// The seeds to run: the one given, or some that differ from run to run. They are printed.
pub(crate) fn seeds(test: &str, count: u64) -> Vec<u64> {
    let first = std::env::var("HALFSILVER_SEED").ok().and_then(|s| s.parse().ok());
    let count = if first.is_some() { 1 } else { from_env("HALFSILVER_SEEDS", count) };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros() as u64;
    let first: u64 = first.unwrap_or(now);
    let seeds: Vec<u64> = (0..count).map(|i| first + i).collect();
    println!("{test}: HALFSILVER_SEED={seeds:?}");
    seeds
}
