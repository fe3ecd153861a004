//! Putting a volume on a newer snapshot of its source (source 004: image update, figure 10). What the two have alike stays
//! where it is; all else is read from the new snapshot, and copied by whoever completes the volume.
//!
//! What always holds:
//! - A block is kept if it is the volume's own, was not written in it since it was made, and did not change in the source
//!   between the old snapshot and the new one. If one of that is not known, none is kept.
//! - The place of a block that is not kept has old bytes, and nothing reads them: its entry says so.
//! - Nobody is at work on the volume meanwhile, and it has no snapshots: its chain is replaced as a whole.

use std::sync::Arc;

use arc_swap::ArcSwapOption;

use super::{Backing, Chain, ChainEditor, Changed, Disk, Epoch, Layer, Link, Version, VersionId, View};
use crate::image::SharedImage;
use crate::store::{BlockIndex, BlockRange, Table};

impl Disk {
    /// The one image in which a volume without snapshots has all that is its own: it is independent, or stands on something
    /// with one log above. None if it has more.
    #[must_use]
    pub fn only_image(&self) -> Option<SharedImage> {
        let chain = self.chain();
        let live = chain.layer(chain.live());
        let Backing::One(image) = &live.image else { return None };
        let is_simple = match (chain.links(), live.table()) {
            ([_], None) => true,
            ([origin, _], Some(_)) => matches!(origin.layer.image, Backing::View(_)),
            _ => false,
        };
        is_simple.then(|| image.clone())
    }

    /// The blocks that a volume, which began as its version `origin` shows, need not copy again when it is put on the second
    /// of two snapshots of `source`, having stood on the first one. No request on it may be under way.
    ///
    /// # Errors
    /// When it is not known what changed, and why; or there is no memory for the answer.
    pub fn blocks_to_keep(
        &self,
        origin: VersionId,
        source: &Disk,
        (old, new): (VersionId, VersionId),
    ) -> Result<Table, String> {
        let ours = self.changes(origin, None).map_err(|e| format!("it is not known what was written to it: {e}"))?;
        let theirs = match source.changes(old, Some(new)) {
            Ok(theirs) => Some(theirs),
            Err(e) => return Err(format!("it is not known what changed in its source since it was made: {e}")),
        };
        let (chain, blocks) = (self.chain(), self.geometry().blocks());
        let kept = Table::in_memory(blocks).map_err(|e| e.to_string())?;
        let no_room = |e: std::io::Error| format!("there is no memory for what it keeps: {e}");
        for word in 0..blocks.div_ceil(64) {
            let owned = match chain.layer(chain.live()).table() {
                Some(table) => table.word_at(word),
                None => u64::MAX >> 64_u64.saturating_sub(blocks - word * 64),
            };
            let written = ours.word(word);
            kept.or_word(word, owned & !written).map_err(no_room)?;
        }
        // Its blocks may have another size.
        for run in theirs.iter().flat_map(super::Changes::runs) {
            let (at, len) = source.geometry().bytes(run);
            let here = self.geometry().covering(at, len);
            kept.clear(BlockRange { start: here.start, end: BlockIndex(here.end.0.min(blocks)) });
        }
        Ok(kept)
    }
}

impl ChainEditor {
    /// Puts a volume on another snapshot: `layer`, on the same image, is its only log from now on, and has what it keeps.
    /// What was discarded is forgotten: it was other content. Nobody may be at work on it.
    ///
    /// # Panics
    /// When it has snapshots or the like.
    pub fn move_base(
        &self,
        disk: &Disk,
        view: Arc<View>,
        (origin, live): (VersionId, VersionId),
        layer: Layer,
        changed: Changed,
    ) {
        view.read_by(&disk.clock);
        let _editing = self.begin();
        assert!(disk.only_image().is_some(), "a volume with snapshots is not put on another one");
        let chain = disk.chain();
        let began = chain.version(chain.live()).began;
        let version = Version::new(origin, Epoch(0));
        version.set_quiesced();
        let origin = Link { version, layer: Layer::full(Backing::View(view.clone())), splits: false };
        let live = Link { version: Version::noting(live, began, Some(changed)), layer, splits: false };
        // What it was before is no moment of it any more.
        disk.marks.store(Arc::default());
        disk.discards.clear(BlockRange { start: BlockIndex(0), end: BlockIndex(disk.geometry().blocks()) });
        disk.base.get_or_init(ArcSwapOption::empty).store(Some(view));
        disk.chain.store(Arc::new(Chain::new(vec![origin, live])));
    }
}
