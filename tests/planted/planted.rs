//! Deliberate defects, switched on one at a time by the tests that must notice them. `scripts/weave` puts this file into the
//! copy of the crate, and the names of all defects, which the overlays beside it have, into the list below.

/// Makes the enum and the list of all that is in it.
macro_rules! defects {
    ($($(#[$what:meta])* $name:ident,)*) => {
        /// A defect: one rule of the design left out.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Defect {
            $($(#[$what])* $name,)*
        }

        impl Defect {
            /// All of them.
            pub const ALL: &[Defect] = &[$(Defect::$name,)*];
        }
    };
}

defects! {}

/// Nobody has looked yet what HALFSILVER_PLANT says; and no defect.
const UNKNOWN: u8 = u8::MAX;
const NONE: u8 = u8::MAX - 1;

static ACTIVE: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(UNKNOWN);

/// Switches one defect on, or all off. Process-wide: tests that use it run one at a time.
pub fn plant(defect: Option<Defect>) {
    ACTIVE.store(defect.map_or(NONE, |d| d as u8), std::sync::atomic::Ordering::SeqCst);
}

/// From here on orders are explored: what the engine locks and counts with belongs to a scheduler. Before anything is made.
pub fn explore() {
    crate::sync::explore();
}

/// Switches on the defect that HALFSILVER_PLANT names, for programs and tests that switch on none themselves.
///
/// # Panics
/// When there is no defect of that name.
#[cold]
fn plant_from_environment() -> u8 {
    let named = std::env::var("HALFSILVER_PLANT").ok().map(|name| {
        let named = Defect::ALL.iter().find(|defect| format!("{defect:?}") == name);
        *named.unwrap_or_else(|| panic!("HALFSILVER_PLANT: there is no defect {name}"))
    });
    plant(named);
    named.map_or(NONE, |d| d as u8)
}

/// Whether this rule is left out on purpose.
#[must_use]
pub fn is(defect: Defect) -> bool {
    let active = match ACTIVE.load(std::sync::atomic::Ordering::Relaxed) {
        UNKNOWN => plant_from_environment(),
        known => known,
    };
    active == defect as u8
}
