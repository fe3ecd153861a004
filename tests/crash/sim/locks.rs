//! Locks of images: who opens one to write has it alone, who only reads shares it with readers. Each goes when the image is
//! closed and nothing is in flight to it any more, and all with their process.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// For each file its readers, or nothing for a writer.
type Held = BTreeMap<u64, Option<usize>>;

#[derive(Clone, Default)]
pub struct Locks(Arc<Mutex<Held>>);

/// Held as long as this is there.
pub struct Lock {
    of: Locks,
    file: u64,
}

impl Locks {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap()
    }

    /// None when somebody has it who does not share it.
    pub fn take(&self, file: u64, reads_only: bool) -> Option<Lock> {
        let mut held = self.held();
        match (held.get_mut(&file), reads_only) {
            (None, _) => drop(held.insert(file, reads_only.then_some(1))),
            (Some(Some(readers)), true) => *readers += 1,
            (Some(_), _) => return None,
        }
        Some(Lock { of: self.clone(), file })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let mut held = self.of.held();
        match held.get_mut(&self.file) {
            Some(Some(readers)) if *readers > 1 => *readers -= 1,
            _ => drop(held.remove(&self.file)),
        }
    }
}
