//! Deliberate defects, compiled in only with the feature `planted`, switched on one at a time by the tests that
//! must notice them. Without the feature every check here is the constant `false`.
//!
//! `scripts/planted` reads the list of names below and fails when one of them is noticed by no test.

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

defects! {
    /// Rule 2: entering does not read the counter again.
    NoEpochRecheck,
    /// Rule 3: each disk of a group is cut at an epoch of its own.
    CutPerDisk,
    /// Rule 4: each part of a request takes the epoch of its moment.
    EpochPerPart,
    /// Rule 4: a request leaves its epoch when its first part is done.
    LeaveEarly,
    /// Rule 5: a preserve does not exclude writes in flight on its block.
    NoBlockLock,
    /// Rule 6: a write is acknowledged when the first version has it.
    AckFirst,
    /// A read through a table is not resolved again after it was read.
    NoReadRecheck,
    /// The plan made before the block lock was held is used.
    NoPlanRecheck,
    /// The owned bit is set after the overwrite instead of before it.
    BitAfterOverwrite,
    /// A draining write does not reach the older version's own copy of the block.
    DrainNotMirrored,
    /// Discards are carried out at once, whoever still reads through the block.
    DiscardAtOnce,
    /// Deleting a version hands nothing to its neighbour.
    DeleteWithoutHandover,
    /// A read through a table does not notice that an entry was deleted and made anew while it read.
    NoReadGeneration,
    /// Folding a log overwrites the base without saving what older versions read there.
    FoldWithoutPreserve,
    /// A log is folded while writes may still go to it.
    FoldWithoutGrace,
    /// The rest of a partly written block is not filled in.
    NoFill,
    /// A draining write of a whole block leaves the newer version's entry in place.
    SupersededEntryKept,
    /// A split leaves the old version's writes on its own leg only.
    SplitNotMirrored,
    /// Connections are pinned only after the counter has moved.
    PinAfterCut,
    /// Connections are cut over only after the counter has moved.
    CutOverAfterMove,
    /// Entries that a write replaces are deleted from the far end of the chain towards the pivot.
    SupersedesFromOutside,
    /// A write does not take back the discard of its block that was put off.
    DiscardNotForgotten,
    /// The place of a deleted entry below the pivot keeps its old bytes.
    PlaceNotEmptied,
    /// Zeros that go into a full image or a log are not written over what is there.
    ZerosNotCopied,
    /// The place of a deleted entry is given back although the block has an entry again.
    ReclaimBlindly,
    /// A read of a full image does not look whether it was given to a newer version meanwhile.
    NoRetireRecheck,
    /// A cleaning of the write-intent bitmap does not notice that another one took the note of a write away.
    CleansSideBySide,
    /// The place of a deleted entry is given back although the block had another entry since, which is durable.
    ReclaimFreedAgain,
    /// A full image goes to an older version before what was written into it is on stable storage.
    GivenUnstored,
    /// A log's table is stored before its image is synced.
    BitsBeforeBytes,
    /// All images are synced by the commit of the log nearest to the pivot, which may be shared.
    ImagesByTheNearest,
    /// Logs are stored from the live version inwards.
    LogsInWrongOrder,
    /// A flush syncs images and stores no table.
    FlushWithoutCommit,
    /// The places of deleted entries are given back before the deletion is durable, by a flush.
    ReclaimBeforeStored,
    /// The place of a log's deleted entry is given back at once.
    FreedAtOnce,
    /// A durable write is acknowledged when it is in the cache.
    DurableWriteCached,
    /// Durable zeros are acknowledged before they are synced.
    DurableZerosCached,
    /// A durable write to a log does not store its entry.
    DurableWithoutEntry,
    /// Entries are made and deleted before the bytes that they announce are written.
    EntryBeforeBytes,
    /// A fold deletes the log's entry before the full image has the block.
    FoldDropsFirst,
    /// A log hands an entry over before its bytes.
    HandOverBitFirst,
    /// A version leaves its chain before what was handed over or folded is durable.
    GoneBeforeCommit,
    /// A sync of a mirror syncs its first leg only.
    OneLegSynced,
    /// A write begins before the bits of its regions are durable.
    IntentNotStored,
    /// A cleaning clears bits of regions that were written meanwhile.
    CleansRecent,
    /// A cleaning does not wait for writes that are under way.
    CleansUnderWriters,
    /// A cleaning does not sync the legs.
    CleansUnstored,
    /// Bits are cleared while the second leg is split.
    CleansWhileSplit,
    /// A leg is added before the bits of all regions are durable.
    LegBeforeBits,
    /// Two legs in sync are taken for equal after a crash, whatever the bits say.
    LegsTakenForEqual,
    /// A cut does not wait for the record of the split.
    SplitNotStored,
    /// An overwrite does not wait until what was saved is durable.
    OverwriteBeforeSaved,
    /// The entry of what was saved is committed before its bytes are synced.
    SavedWithoutBytes,
    /// A fold overwrites before what it saved is durable.
    FoldBeforeSaved,
    /// A version leaves its chain before what it handed over to an older one is durable.
    HandOverNotStored,
    /// The entry of what could not be saved durably is not taken back.
    SavedEntryKept,
    /// The entry of what a fold could not save durably is not taken back.
    FoldedEntryKept,
    /// A version that cannot be kept is given up in memory only.
    GivenUpInMemory,
    /// What a version shows is not stored before it is quiesced.
    ShownNotStored,
    /// That a version is broken is not noted before the overwrite.
    BrokenNotMarked,
    /// A block is let go although its entry went before its lock was held.
    LetGoOfOverwritten,
    /// A discard that was put off is carried out without the block's lock.
    DiscardNotLocked,
    /// A discard that was put off is carried out although the block was written meanwhile.
    DiscardNotRechecked,
    /// The deletion of an entry is not announced to readers.
    GenerationNotAdvanced,
    /// A discard that is carried out is not noted as a change.
    DiscardNotNoted,
    /// A change is noted after its bytes are written.
    NotedAfterBytes,
    /// A write of an old epoch is noted for its own version only, also where it may reach one of several places.
    NotedForWriterOnly,
    /// What was noted for a version is forgotten when it is deleted.
    ChangesNotMerged,
    /// A changed table that is not believed counts as an empty one.
    UnknownTakenAsUnchanged,
    /// A block that a volume gets has its bit before its bytes.
    FilledBitFirst,
    /// A volume gets a block without its lock.
    FilledWithoutLock,
    /// A volume takes a hole below for zeros although there are old bytes in its log.
    FilledOverOldBytes,
    /// A volume is recorded as independent before its log is on stable storage.
    IndependentBeforeStored,
    /// A volume that is updated keeps blocks that were written in it.
    WrittenBlockKept,
    /// A volume that is updated takes its source for unchanged where that is not known.
    UnknownSourceKept,
    /// A volume that is made independent copies what it stands on over what was written to it meanwhile.
    FilledOverWritten,
    /// What a volume that is updated keeps is in a table on stable storage before its bytes are there.
    KeptBeforeBytes,
    /// A write of a part of a block that a restore has not brought back leaves the rest as it was before the restore.
    PendingNotFilled,
    /// A block counts as brought back before its bytes are there.
    SettledBeforeBytes,
    /// A restore begins while changes are under way that were decided before it.
    OldPlansNotAwaited,
    /// A change does not wait while a restore is about to begin.
    GateIgnored,
    /// That blocks were brought back is stored before their bytes are.
    SettledBeforeSync,
    /// A flush does not store which blocks were brought back.
    SettledNotStored,
    /// A block is brought back without saving what an older version reads there.
    BroughtBackUnsaved,
    /// A block is brought back over what was written to it meanwhile.
    BroughtBackOverWritten,
    /// Discards from before a restore are still carried out after it.
    DiscardsOutliveRestore,
    /// Blocks that a restore changes are not noted as changed.
    RestoreNotNoted,
    /// Background work has more in flight beside an active guest than the window.
    WindowNotKept,
    /// A turn that ends is not given to those who wait for one.
    TurnNotPassedOn,
    /// A guest that left in the middle of its requests counts as active for ever.
    GoneGuestStaysActive,
}

/// Nobody has looked yet what HALFSILVER_PLANT says; and no defect.
#[cfg(feature = "planted")]
const UNKNOWN: u8 = u8::MAX;
#[cfg(feature = "planted")]
const NONE: u8 = u8::MAX - 1;

#[cfg(feature = "planted")]
static ACTIVE: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(UNKNOWN);

/// Switches one defect on, or all off. Process-wide: tests that use it run one at a time.
#[cfg(feature = "planted")]
pub fn plant(defect: Option<Defect>) {
    ACTIVE.store(defect.map_or(NONE, |d| d as u8), std::sync::atomic::Ordering::SeqCst);
}

/// Switches on the defect that HALFSILVER_PLANT names, for programs and tests that switch on none themselves.
///
/// # Panics
/// When there is no defect of that name.
#[cfg(feature = "planted")]
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
#[cfg(feature = "planted")]
#[must_use]
pub fn is(defect: Defect) -> bool {
    let active = match ACTIVE.load(std::sync::atomic::Ordering::Relaxed) {
        UNKNOWN => plant_from_environment(),
        known => known,
    };
    active == defect as u8
}

/// Whether this rule is left out on purpose: never.
#[cfg(not(feature = "planted"))]
#[must_use]
#[inline(always)]
pub const fn is(_defect: Defect) -> bool {
    false
}
