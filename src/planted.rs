//! Deliberate defects, compiled in only with the feature `planted`, switched on one at a time by the tests that
//! must notice them. Without the feature every check here is the constant `false`.

/// A defect: one rule of the design left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Defect {
    /// Rule 1: the epoch is entered before the avail index is loaded.
    EpochBeforeAvail = 1,
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
    /// A commit of a durable table does not sync it.
    CommitWithoutSync,
    /// A commit stores bits that were set after its first step.
    CommitOfLaterBits,
    /// Who asks for a commit shares the one that is running.
    CommitSharesRunning,
    /// A table that was read is taken for stored.
    LeftUnsynced,
    /// A table that outlived a process is not compared with its durable copy.
    ResumedBlindly,
    /// A snapshot that was not stored is kept after a power cut.
    UnfinishedKept,
    /// A snapshot that was prepared, and perhaps never cut, is kept.
    PendingKept,
}

impl Defect {
    /// All of them, for tests that count.
    pub const ALL: [Defect; 59] = [
        Defect::EpochBeforeAvail,
        Defect::NoEpochRecheck,
        Defect::CutPerDisk,
        Defect::EpochPerPart,
        Defect::LeaveEarly,
        Defect::NoBlockLock,
        Defect::AckFirst,
        Defect::NoReadRecheck,
        Defect::NoPlanRecheck,
        Defect::BitAfterOverwrite,
        Defect::DrainNotMirrored,
        Defect::DiscardAtOnce,
        Defect::DeleteWithoutHandover,
        Defect::NoReadGeneration,
        Defect::FoldWithoutPreserve,
        Defect::FoldWithoutGrace,
        Defect::NoFill,
        Defect::SupersededEntryKept,
        Defect::SplitNotMirrored,
        Defect::PinAfterCut,
        Defect::CutOverAfterMove,
        Defect::SupersedesFromOutside,
        Defect::DiscardNotForgotten,
        Defect::PlaceNotEmptied,
        Defect::ZerosNotCopied,
        Defect::ReclaimBlindly,
        Defect::NoRetireRecheck,
        Defect::CleansSideBySide,
        Defect::ReclaimFreedAgain,
        Defect::GivenUnstored,
        Defect::BitsBeforeBytes,
        Defect::ImagesByTheNearest,
        Defect::LogsInWrongOrder,
        Defect::FlushWithoutCommit,
        Defect::ReclaimBeforeStored,
        Defect::FreedAtOnce,
        Defect::DurableWriteCached,
        Defect::DurableZerosCached,
        Defect::DurableWithoutEntry,
        Defect::EntryBeforeBytes,
        Defect::FoldDropsFirst,
        Defect::HandOverBitFirst,
        Defect::GoneBeforeCommit,
        Defect::OneLegSynced,
        Defect::IntentNotStored,
        Defect::CleansRecent,
        Defect::CleansUnderWriters,
        Defect::CleansUnstored,
        Defect::CleansWhileSplit,
        Defect::LegBeforeBits,
        Defect::LegsTakenForEqual,
        Defect::SplitNotStored,
        Defect::CommitWithoutSync,
        Defect::CommitOfLaterBits,
        Defect::CommitSharesRunning,
        Defect::LeftUnsynced,
        Defect::ResumedBlindly,
        Defect::UnfinishedKept,
        Defect::PendingKept,
    ];
}

#[cfg(feature = "planted")]
static ACTIVE: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);

/// Switches one defect on, or all off. Process-wide: tests that use it run one at a time.
#[cfg(feature = "planted")]
pub fn plant(defect: Option<Defect>) {
    ACTIVE.store(defect.map_or(0, |d| d as u8), std::sync::atomic::Ordering::SeqCst);
}

/// Switches on the defect that HALFSILVER_PLANT names, for tests of the whole program.
///
/// # Panics
/// When there is no defect of that name.
#[cfg(feature = "planted")]
pub fn plant_from_environment() {
    let Ok(name) = std::env::var("HALFSILVER_PLANT") else { return };
    let named = Defect::ALL.into_iter().find(|defect| format!("{defect:?}") == name);
    plant(Some(named.unwrap_or_else(|| panic!("HALFSILVER_PLANT: there is no defect {name}"))));
}

/// Whether this rule is left out on purpose.
#[cfg(feature = "planted")]
#[must_use]
pub fn is(defect: Defect) -> bool {
    ACTIVE.load(std::sync::atomic::Ordering::Relaxed) == defect as u8
}

/// Whether this rule is left out on purpose: never.
#[cfg(not(feature = "planted"))]
#[must_use]
#[inline(always)]
pub const fn is(_defect: Defect) -> bool {
    false
}
