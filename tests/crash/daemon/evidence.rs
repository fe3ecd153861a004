//! The evidence of a simulated host, which is only looked at.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::engine::{LegImage, Pair, PairError, PairFacts};
use halfsilver::image::{ImageError, ImageErrorKind, ImageOp, IoQueue, SharedImage};
use halfsilver::recovery::{Durable, DurableFacts, Evidence, ImageFacts, Recovery, Shutdown, decide};
use halfsilver::store::{DurableTable, Fingerprint, MirrorRecord, RunTableFacts, Table, TableError};
use uuid::Uuid;

use super::log_table;
use crate::host::Host;
use crate::media::{run, set_aside};
use crate::run::Shape;
use crate::schedule::Rng;

/// As `recovery::Files`.
struct Simulated<'a> {
    host: &'a Host,
    shape: Shape,
}

/// What a start makes of what a host has.
pub fn decided(host: &Rc<RefCell<Host>>, shape: Shape) -> Result<Recovery, String> {
    let host = host.borrow();
    let record = host.record.clone().ok_or("its record is gone")?;
    let evidence = Simulated { host: &host, shape };
    Ok(decide(&record, Shutdown::of(&record, &evidence, host.boot), &evidence))
}

impl Simulated<'_> {
    fn open(&self, path: &Path) -> Result<SharedImage, ImageError> {
        self.host.open(path).map_err(|e| ImageError {
            kind: ImageErrorKind::Io,
            op: ImageOp::Open,
            path: path.to_owned(),
            at: None,
            message: e,
            errno: None,
        })
    }

    fn image(&self, path: &Path) -> Result<ImageFacts, ImageError> {
        let image = self.open(path)?;
        let (size_bytes, unit_bytes) = (image.size_bytes(), image.alignment().offset_bytes);
        Ok(ImageFacts { path: path.to_owned(), size_bytes, unit_bytes })
    }

    fn facts(table: Option<&Arc<Table>>, path: String) -> Result<RunTableFacts, TableError> {
        let table = table.ok_or_else(|| TableError::Io { path: path.into(), message: "it is not there".to_owned() })?;
        Ok(RunTableFacts { ones: table.count(), is_broken: table.is_broken() })
    }
}

impl Evidence for Simulated<'_> {
    fn block_bytes(&self) -> u32 {
        self.shape.block
    }

    fn full_image_looks(&self) -> Option<Fingerprint> {
        None
    }

    fn full_image(&self, _made_here: bool) -> Result<ImageFacts, ImageError> {
        let config = &self.host.record.as_ref().unwrap().config;
        self.image(config["path"].as_str().unwrap().as_ref())
    }

    fn leg(&self, path: &Path) -> Result<ImageFacts, ImageError> {
        self.image(path)
    }

    fn layer_image(&self, path: &Path) -> Result<ImageFacts, ImageError> {
        self.image(path)
    }

    fn mirror(&self, mirror: &MirrorRecord, usable: &[Uuid], size_bytes: u64) -> Result<PairFacts, PairError> {
        let mut images = Vec::new();
        for leg in mirror.legs.iter().filter(|leg| usable.contains(&leg.id)) {
            images.push(LegImage { id: leg.id, image: self.open(&leg.path)? });
        }
        let (id, block, bitmap) = (mirror.bitmap, self.shape.block, self.open(&log_table(mirror.bitmap))?);
        let _aside = set_aside();
        let queue = IoQueue::simulated();
        let examined = async move { Pair::examine(&images, bitmap, id, size_bytes, block, &queue).await };
        run(&mut Rng::new(1), examined)
    }

    fn looks(&self, _path: &Path) -> Option<Fingerprint> {
        None
    }

    fn is_file(&self, path: &Path) -> bool {
        self.host.files.contains_key(path)
    }

    fn run_table(&self, id: Uuid, _blocks: u64) -> Result<RunTableFacts, TableError> {
        Simulated::facts(self.host.run_tables.get(&id), format!("{id}.bits"))
    }

    fn saved_table(&self, _id: Uuid, _blocks: u64, _seal: Uuid) -> Result<(), TableError> {
        unreachable!("no clean stop is simulated")
    }

    fn durable_table(&self, _which: Durable, id: Uuid, blocks: u64) -> Result<DurableFacts, TableError> {
        let place = log_table(id);
        let image = self.open(&place).map_err(|e| TableError::Io { path: place.clone(), message: e.to_string() })?;
        let _aside = set_aside();
        let (queue, table) = (IoQueue::simulated(), Arc::new(Table::in_memory(blocks).unwrap()));
        let loaded = run(&mut Rng::new(1), async move { DurableTable::load(image, id, table, &queue).await });
        Ok(DurableFacts { place, damaged: loaded?.1.damaged })
    }

    fn is_given_up(&self, _id: Uuid) -> bool {
        false
    }

    fn run_changes(&self, id: Uuid, _blocks: u64) -> Result<RunTableFacts, TableError> {
        Simulated::facts(self.host.changed.get(&id), format!("{id}.changed"))
    }

    fn saved_changes(&self, _id: Uuid, _blocks: u64, _seal: Uuid) -> Result<(), TableError> {
        unreachable!("no clean stop is simulated")
    }

    fn why_broken(&self, _id: Uuid) -> Option<String> {
        None
    }
}
