//! Dirty bitmaps: which blocks were written in the epochs of a version (design: "was it written since this version
//! began?"; source 004: what tells the blocks that a volume and its source do not share).
//!
//! A *marker* is a frozen version or a [`Mark`], what is left of one that was deleted: a moment of the disk. The table of
//! a marker leads up to it from the marker before, and that of the live version up to now. So what differs between two
//! moments is the union of the tables after the first one, up to the second one.
//!
//! What always holds:
//! - A bit is set under the block's lock, before its bytes are submitted, in the table of the version that the request
//!   belongs to, and of newer ones that it must reach in other places. Whoever finds the bytes finds the bit.
//! - When a marker goes, its table is merged into that of the next newer one, and only then can nobody see it any more.
//! - What is not known counts as changed: a table that could not be extended, or was lost, is never taken for an empty one.

use std::sync::Arc;

use super::restoring::Restore;
use super::{
    Backing, Chain, ChainEditor, Changed, Disk, Epoch, Geometry, Link, Mark, VersionId, VersionIn, VersionIndex,
};
use crate::store::{BlockIndex, BlockRange, Table};

const NOT_NOTED: &str = "nothing was noted of its changes";

/// Why it cannot be said what changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoChanges {
    /// There is no such moment.
    #[error("it is not there any more")]
    Gone,
    /// The first one is not the older one.
    #[error("the first one is newer than the second one")]
    Order,
    /// Requests of its epochs are still on their way.
    #[error("it is still draining")]
    Draining,
    /// Its content cannot be vouched for.
    #[error("its content is lost: {0}")]
    Broken(String),
    /// Everything may have changed.
    #[error("{0}")]
    Unknown(String),
}

/// Where the answer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeSource {
    /// Dirty bitmaps: what was written, also if the bytes are the same.
    Changed,
    /// Block maps: what is stored in different places.
    Owned,
}

/// The blocks that may differ between two moments of a disk. All others are equal.
#[derive(Clone)]
pub struct Changes {
    blocks: u64,
    tables: Tables,
    /// Of the block maps' blocks only those count that the two versions have in different layers.
    ends: Option<Ends>,
    /// The first block that the older moment does not have, or not all of: its disk was smaller. The same as `blocks` if it
    /// was not.
    grown_from: u64,
}

impl Changes {
    /// Where this comes from.
    #[must_use]
    pub fn source(&self) -> ChangeSource {
        if self.ends.is_some() { ChangeSource::Owned } else { ChangeSource::Changed }
    }

    /// How many blocks the later moment has.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Whether the block may differ.
    #[must_use]
    pub fn contains(&self, block: BlockIndex) -> bool {
        self.word(block.0 / 64) & (1 << (block.0 % 64)) != 0
    }

    /// The bits of blocks `index` × 64 and on.
    #[must_use]
    pub fn word(&self, index: u64) -> u64 {
        let (before, within) = (bits_below(index, self.grown_from), bits_below(index, self.blocks));
        let mut bits = self.tables.iter().fold(0, |bits, table| bits | table.word_at(index)) & within;
        if let Some((chain, from, to)) = self.ends.as_ref().filter(|_| bits != 0) {
            let differs = |bit: &u32| {
                let block = BlockIndex(index * 64 + u64::from(*bit));
                let before = chain.at(*from).resolve(block);
                // Once more: what is saved for the older one goes before what that makes way for.
                before != chain.at(*to).resolve(block) || before != chain.at(*from).resolve(block)
            };
            bits = (0..64).filter(|bit| bits & (1 << bit) != 0).filter(differs).fold(0, |all, bit| all | 1 << bit);
        }
        bits | within & !before
    }

    /// The first word at or after `index` that may have bits.
    #[must_use]
    pub fn next_word(&self, index: u64) -> Option<u64> {
        let grown = (self.grown_from < self.blocks).then(|| index.max(self.grown_from / 64));
        let noted = self.tables.iter().filter_map(|table| table.next_word(index));
        noted.chain(grown).min().filter(|&at| at * 64 < self.blocks)
    }

    /// The first run of such blocks at or after `from`.
    #[must_use]
    pub fn next_run(&self, from: BlockIndex) -> Option<BlockRange> {
        let mut at = from.0;
        let start = loop {
            let word = self.next_word(at / 64)?;
            at = at.max(word * 64);
            let rest = self.word(word) & (u64::MAX << (at % 64));
            if rest != 0 {
                break word * 64 + u64::from(rest.trailing_zeros());
            }
            at = (word + 1) * 64;
        };
        let mut end = start;
        loop {
            let rest = !self.word(end / 64) >> (end % 64);
            let ones = if rest == 0 { 64 - end % 64 } else { u64::from(rest.trailing_zeros()).min(64 - end % 64) };
            end += ones;
            if ones == 0 || !end.is_multiple_of(64) || end >= self.blocks {
                break;
            }
        }
        Some(BlockRange { start: BlockIndex(start), end: BlockIndex(end.min(self.blocks)) })
    }

    /// All runs in ascending order; no two of them touch.
    pub fn runs(&self) -> impl Iterator<Item = BlockRange> + '_ {
        std::iter::successors(self.next_run(BlockIndex(0)), |run| self.next_run(run.end))
    }

    /// The same for who keeps them.
    pub fn into_runs(self) -> impl Iterator<Item = BlockRange> + Send + 'static {
        let mut next = Some(BlockIndex(0));
        std::iter::from_fn(move || {
            let run = self.next_run(next?);
            next = run.map(|run| run.end);
            run
        })
    }

    /// How many blocks are in this, or in the other, which is of as many blocks.
    #[must_use]
    pub fn count_with(&self, other: &Changes) -> u64 {
        let next = |at| [self.next_word(at), other.next_word(at)].into_iter().flatten().min();
        let words = std::iter::successors(next(0), |word| next(word + 1));
        words.map(|word| u64::from((self.word(word) | other.word(word)).count_ones())).sum()
    }

    /// How many blocks there are in all.
    #[must_use]
    pub fn count(&self) -> u64 {
        let words = std::iter::successors(self.next_word(0), |word| self.next_word(word + 1));
        words.map(|word| u64::from(self.word(word).count_ones())).sum()
    }
}

/// The bits of the blocks of a word that come before `end`.
fn bits_below(word: u64, end: u64) -> u64 {
    match end.saturating_sub(word * 64) {
        some @ 0..64 => !(u64::MAX << some),
        _ => u64::MAX,
    }
}

/// A moment and what leads up to it.
struct Moment<'a> {
    began: Epoch,
    changed: Option<&'a Changed>,
}

fn moments<'a>(chain: &'a Chain, marks: &'a [Arc<Mark>]) -> Vec<Moment<'a>> {
    let versions = chain.links().iter().map(|l| Moment { began: l.version.began, changed: l.version.changed() });
    let marks = marks.iter().map(|m| Moment { began: m.began, changed: m.changed.as_ref() });
    let mut all: Vec<_> = versions.chain(marks).collect();
    all.sort_by_key(|moment| moment.began);
    all
}

/// Hands what was noted for the marker that began then on to the next newer one; to nobody if nothing older is left
/// that could ask.
fn hand_on(chain: &Chain, marks: &[Arc<Mark>], began: Epoch) {
    let all = moments(chain, marks);
    let Some(at) = all.iter().position(|moment| moment.began == began).filter(|&at| at > 0) else { return };
    if let Some(next) = all.get(at + 1).and_then(|next| next.changed) {
        next.take_in(all[at].changed);
    }
}

/// A live version with nothing older needs no table. It stays the same version: others hold it.
fn forget_changes_of_live(links: &[Link], marks: &[Arc<Mark>]) {
    if let ([live], []) = (links, marks)
        && live.version.changed().is_some()
    {
        live.version.forget_changes();
    }
}

impl VersionIn<'_> {
    /// Notes that blocks of it are about to be changed. Their locks are held, and nothing has been submitted yet.
    pub(super) fn note(self, blocks: BlockRange) {
        if let Some(Changed::Noted(table)) = self.version().changed()
            && let Err(e) = table.note(blocks)
            && !table.is_broken()
        {
            // The guest's write goes on.
            table.mark_broken();
            log::error!("what changed in a disk from now on cannot be noted, a backup must copy it whole: {e}");
        }
    }
}

impl VersionIn<'_> {
    /// Whether every block is noted as changed, so that there is nothing more to note.
    pub(super) fn has_noted_all(self) -> bool {
        let noted = self.version().changed().and_then(Changed::table);
        noted.is_some_and(|table| table.count() == table.blocks())
    }
}

impl ChainEditor {
    /// Notes what was noted for a mark for the next newer one, too: it may go from the records then, and from here
    /// ([`ChainEditor::forget_mark`]). If it stays after all, more is reported than was changed.
    pub fn hand_on_mark(&self, disk: &Disk, id: VersionId) {
        let _editing = self.begin();
        let marks = disk.marks.load_full();
        if let Some(mark) = marks.iter().find(|mark| mark.id == id) {
            hand_on(&disk.chain(), &marks, mark.began);
        }
    }

    /// Takes a mark away; what was noted for it goes to the next newer one.
    pub fn forget_mark(&self, disk: &Disk, id: VersionId) {
        let _editing = self.begin();
        let (chain, marks) = (disk.chain(), disk.marks.load_full());
        let Some(mark) = marks.iter().find(|mark| mark.id == id) else { return };
        let left: Vec<_> = marks.iter().filter(|mark| mark.id != id).cloned().collect();
        hand_on(&chain, &marks, mark.began);
        forget_changes_of_live(chain.links(), &left);
        disk.marks.store(Arc::new(left));
    }

    /// What was noted for a version that goes stays, as a mark or in the next newer marker's table; `links` are the versions
    /// that will be left. Before they are published: nobody may find neither.
    pub(super) fn keep_changes(disk: &Disk, gone: VersionIn<'_>, links: &[Link]) {
        let (version, marks) = (gone.version(), disk.marks.load_full());
        if version.leaves_mark() {
            let (id, began, changed) = (version.id, version.began, version.changed().cloned());
            let mark = Mark { id, began, size_bytes: version.size_within(disk.geometry().size_bytes), changed };
            let mut more = marks.to_vec();
            more.push(Arc::new(mark));
            more.sort_by_key(|mark| mark.began);
            disk.marks.store(Arc::new(more));
            return;
        }
        hand_on(gone.chain, &marks, version.began);
        forget_changes_of_live(links, &marks);
    }
}

impl Disk {
    /// The moments of which only the changes are remembered, oldest first.
    #[must_use]
    pub fn marks(&self) -> Arc<Vec<Arc<Mark>>> {
        self.marks.load_full()
    }

    /// Adds what is remembered of such moments, before the disk is served.
    pub fn remember_marks(&self, marks: Vec<Mark>) {
        let mut all = self.marks.load().to_vec();
        all.extend(marks.into_iter().map(Arc::new));
        all.sort_by_key(|mark| mark.began);
        self.marks.store(Arc::new(all));
    }

    /// Whether there is an older moment from which changes of the live version are counted, or will be after a cut.
    #[must_use]
    pub fn has_markers(&self) -> bool {
        self.chain().live() > 0 || !self.marks.load().is_empty()
    }

    /// The blocks of a volume that are in its own images: all that it does not read from what it stands on. None if it
    /// stands on nothing, and has everything.
    #[must_use]
    pub fn owned_by_volume(&self) -> Option<Changes> {
        let chain = self.chain();
        if !matches!(chain.layer(0).image, Backing::View(_)) {
            return None;
        }
        let tables = chain.links().iter().filter_map(|link| link.layer.table().cloned()).collect();
        let (blocks, ends) = (self.geometry().blocks(), Some((chain.clone(), 0, chain.live())));
        Some(Changes { blocks, tables, ends, grown_from: blocks })
    }

    /// The blocks that may differ between the moment `from`, a frozen version or a mark, and the later one `to`, or the
    /// present. Up to the present it says what was changed when it is called, and perhaps what is changed after that.
    ///
    /// # Errors
    /// When there is no such moment or its content is not settled, or when everything may have changed.
    pub fn changes(&self, from: VersionId, to: Option<VersionId>) -> Result<Changes, NoChanges> {
        // In this order: what leaves the chain is a mark, or merged, before.
        let chain = self.chain();
        let marks = self.marks.load_full();
        let now = self.geometry();
        let (first, start, from_bytes) = find(&chain, &marks, from)?;
        let (last, end, to_bytes) = match to {
            None => (chain.version(chain.live()).began, Some(chain.live()), now.size_bytes),
            Some(to) => find(&chain, &marks, to)?,
        };
        if first > last {
            return Err(NoChanges::Order);
        }
        let all = moments(&chain, &marks);
        let between = all.iter().filter(|moment| first < moment.began && moment.began <= last);
        let known = |moment: &Moment| match moment.changed {
            Some(changed) => changed.known().cloned().map_err(str::to_owned),
            None => Err(NOT_NOTED.to_owned()),
        };
        let (tables, unknown): (Vec<_>, Vec<_>) = between.map(known).partition(Result::is_ok);
        let tables = tables.into_iter().flatten().collect();
        let (from_bytes, to_bytes) = (from_bytes.min(now.size_bytes), to_bytes.min(now.size_bytes));
        let blocks = Geometry { size_bytes: to_bytes, ..now }.blocks();
        let grown_from = if from_bytes < to_bytes { from_bytes / u64::from(now.block_bytes) } else { blocks };
        match unknown.into_iter().find_map(Result::err) {
            None => Ok(Changes { blocks, tables, ends: None, grown_from }),
            Some(why) => {
                let (tables, ends) = by_owners(&chain, start, end).ok_or(NoChanges::Unknown(why))?;
                Ok(Changes { blocks, tables, ends: Some(ends), grown_from })
            }
        }
    }
}

/// When a moment began, where its version is, and how large it is. It must be settled what it shows.
fn find(chain: &Chain, marks: &[Arc<Mark>], id: VersionId) -> Result<(Epoch, Option<VersionIndex>, u64), NoChanges> {
    if let Some(mark) = marks.iter().find(|mark| mark.id == id) {
        return Ok((mark.began, None, mark.size_bytes));
    }
    let index = chain.position(id).filter(|&index| index < chain.live()).ok_or(NoChanges::Gone)?;
    let version = chain.version(index);
    match version.broken() {
        Some(reason) => Err(NoChanges::Broken(reason.to_owned())),
        None if !version.is_quiesced() => Err(NoChanges::Draining),
        None => Ok((version.began, Some(index), version.size_within(u64::MAX))),
    }
}

type Tables = Vec<Arc<Table>>;
/// A chain, and two versions in it.
type Ends = (Arc<Chain>, VersionIndex, VersionIndex);

/// By where the two versions have their bytes: a block that both have in one layer is equal. Only within a segment, and
/// only while everything is kept for both.
fn by_owners(chain: &Arc<Chain>, from: Option<VersionIndex>, to: Option<VersionIndex>) -> Option<(Tables, Ends)> {
    let (from, to) = (from?, to?);
    // While a disk is being restored its live version shows another one's blocks.
    if to == chain.live() && !matches!(chain.restore(), Restore::None) {
        return None;
    }
    let segment = chain.segment_of(from);
    if segment != chain.segment_of(to) || [from, to].iter().any(|&end| !chain.version(end).keeps_blocks()) {
        return None;
    }
    let tables = chain.links()[segment.first..=segment.last].iter().filter_map(|link| link.layer.table().cloned());
    Some((tables.collect(), (chain.clone(), from, to)))
}
