//! Volumes of the random trees are put on their source's present, with what they may keep.

use super::{
    Arc, BLOCK, Backing, BlockIndex, DurableTable, Layer, Log, PAYLOAD_BYTES, SimImage, Tree, VersionId, View, sim,
    table,
};
use halfsilver::engine::Changed;
use halfsilver::image::Image;
use halfsilver::store::{BlockRange, Table};

impl Tree {
    /// As Manager::update in src/ops/update_volume.rs, while nobody is at work on the volume.
    pub(super) fn update(&mut self) {
        let may = |n: &super::Node| n.frozen.is_empty() && n.filling.is_none() && n.from.is_some();
        let able: Vec<usize> = (0..self.nodes.len()).filter(|&i| may(&self.nodes[i])).collect();
        if able.is_empty() {
            return;
        }
        let at = able[self.rng.below(able.len())];
        let (source, old) = self.nodes[at].from.unwrap();
        let disk = self.nodes[at].disk.clone();
        let (Some(of), Some(image)) = (self.nodes.iter().position(|n| n.id == source), disk.only_image()) else {
            return;
        };
        let before = self.nodes[of].frozen.len();
        self.cut(of);
        if self.nodes[of].frozen.len() == before {
            return;
        }
        let newest = self.nodes[of].frozen.last_mut().unwrap();
        newest.version.set_quiesced();
        newest.volumes += 1;
        let (new, bytes, of) = (newest.version.id, newest.bytes.clone(), self.nodes[of].disk.clone());
        let was = self.nodes[at].origin.as_ref().unwrap().0;
        let kept = disk.blocks_to_keep(was, &of, (old, new));
        self.counts.updated += 1;
        match &kept {
            Ok(kept) => self.counts.kept_blocks += kept.count(),
            Err(_) => self.counts.kept_nothing += 1,
        }
        let layer = self.log_of(Backing::One(image), kept.ok());
        let (origin, live) = (VersionId::new_v4(), VersionId::new_v4());
        let changed = match self.rng.chance(80) {
            true => Changed::Noted(Arc::new(table())),
            false => Changed::unknown("nobody noted it"),
        };
        self.editor.move_base(&disk, View::of(of, new, "base"), (origin, live), layer, changed);
        let node = &mut self.nodes[at];
        (node.live, node.origin, node.from) = (bytes.clone(), Some((origin, bytes)), Some((source, new)));
        if let Some(base) = node.base.replace((source, new)) {
            self.let_go_of(base);
        }
        self.check();
    }

    fn log_of(&mut self, image: Backing, kept: Option<Table>) -> Layer {
        let of = Arc::new(table());
        let kept = kept.unwrap_or_else(table);
        if self.rng.chance(50) {
            of.merge(&kept).unwrap();
            return Layer::of(image, of);
        }
        let durable = SimImage::new("table", usize::try_from(DurableTable::image_bytes(of.blocks())).unwrap(), 512);
        let (queue, bytes) = (self.queue.clone(), image.clone());
        let made = async move {
            let id = VersionId::nil();
            let table = DurableTable::create(Arc::new(durable), id, of, [0; PAYLOAD_BYTES], &queue).await.unwrap();
            table.take_in(&kept).unwrap();
            halfsilver::job::store_kept(&queue, &table, &bytes).await.unwrap();
            table
        };
        let table_of_log = crate::schedule::run::<sim::Sim, _>(&mut self.rng, made);
        Layer::logged(image, Arc::new(Log { table: table_of_log, freed: table() }))
    }
}

/// Blocks of the source and of the volume need not have one size.
#[test]
fn what_changed_is_told_in_blocks_of_another_size() {
    for block_bytes in [BLOCK, 4 * BLOCK] {
        let bench = crate::bench::Bench::new();
        let all = bench.sectors();
        let per_block = block_bytes as usize / super::SECTOR;
        let cut = |bench: &crate::bench::Bench| {
            let (cut, _) = bench.cut();
            cut.frozen[0].set_quiesced();
            cut.frozen[0].clone()
        };
        bench.write(&bench.ticket(), 0..all, 1);
        let old = cut(&bench);
        let image = bench.empty_image("volume");
        let blocks = image.size_bytes().div_ceil(u64::from(block_bytes));
        let layer = Layer::of(Backing::One(Arc::new(image)), Arc::new(Table::in_memory(blocks).unwrap()));
        let options = super::DiskOptions {
            image: Backing::View(View::of(bench.disk.clone(), old.id, "disk@old")),
            block_bytes,
            read_only: false,
            discards: Arc::new(Table::in_memory(blocks).unwrap()),
        };
        let (origin, live) = (VersionId::new_v4(), VersionId::new_v4());
        let changed = Some(Arc::new(Table::in_memory(blocks).unwrap()));
        let volume = super::Disk::noting_volume(bench.clock.clone(), options, origin, (live, layer), changed);
        let chain = volume.chain();
        let Some(owned) = chain.layer(1).table() else { panic!("it has a log") };
        let every = BlockRange { start: BlockIndex(0), end: BlockIndex(blocks) };
        owned.prepare(every).unwrap();
        owned.set(every);
        bench.write(&bench.ticket(), 9..10, 2);
        let new = cut(&bench);
        let kept = volume.blocks_to_keep(origin, &bench.disk, (old.id, new.id)).unwrap();
        let gone: Vec<u64> = (0..blocks).filter(|&block| !kept.get(BlockIndex(block))).collect();
        assert_eq!(gone, [(9 / per_block) as u64], "blocks of {block_bytes} bytes");
    }
}
