//! Named moments at which a test kills the program: before and after each step that outlives it.
//!
//! What always holds: a point is nothing at all. `scripts/weave` puts `tests/planted/crash.rs` in the place of this file,
//! and what is built from there dies where it is told to.

/// A point; the test's list in `tests/daemon/kills/points.rs` has its name.
#[inline(always)]
pub(crate) const fn point(_name: &str) {}
