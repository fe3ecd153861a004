//! The evidence of real files: looked at as a start would open them, but only to read, and closed again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::{Durable, DurableFacts, Evidence, ImageFacts};
use crate::door::{LegImage, PairError, PairFacts, examine_mirror};
use crate::host::{FileKind, Host};
use crate::image::{Direct, ImageError, ImageErrorKind, ImageOptions, IoQueue, SharedImage};
use crate::store::{
    Believed, DurableTable, Fingerprint, Identity, LoadReport, MirrorRecord, Pack, PackFacts, RunTableFacts, Table,
    TableError, TableFiles, TableName,
};

/// How a disk's images are opened.
#[derive(Clone, Debug)]
pub struct ImageSetup {
    /// The disk's own image.
    pub path: PathBuf,
    /// The block size of its tables.
    pub block_bytes: u32,
    /// Whether the page cache is gone around.
    pub direct: Direct,
    /// Whether the disk's own image is only read.
    pub read_only: bool,
}

/// What there is of one disk in our directories.
pub struct Files<'a> {
    /// The machine that they are on.
    pub host: &'a dyn Host,
    /// Where its tables are.
    pub tables: &'a TableFiles,
    /// This boot of the machine.
    pub boot: Uuid,
    /// Its images.
    pub setup: ImageSetup,
    /// How long to wait for somebody who holds an image: after a kill the old process's last transfers may still run, and
    /// nothing is to be read before they are done.
    pub lock_wait: Duration,
}

impl Files<'_> {
    fn probe(&self, path: &Path, read_only: bool, direct: Direct) -> Result<SharedImage, ImageError> {
        self.host.probe_image(path, ImageOptions { direct, read_only, lock_wait: self.lock_wait })
    }

    /// Through the page cache where there is no other way to move units of so many bytes.
    fn probe_made_here(&self, path: &Path, read_only: bool, unit_bytes: u32) -> Result<SharedImage, ImageError> {
        let is_direct = self.setup.direct == Direct::On;
        match self.probe(path, read_only, self.setup.direct) {
            Err(e) if is_direct && e.kind == ImageErrorKind::Unsuitable => self.probe(path, read_only, Direct::Off),
            Ok(image) if image.alignment().offset_bytes > unit_bytes => {
                drop(image);
                self.probe(path, read_only, Direct::Off)
            }
            other => other,
        }
    }

    /// For a table that is changed in place.
    fn shared(&self, path: &Path) -> Result<SharedImage, ImageError> {
        self.probe(path, false, Direct::Off)
    }

    fn run_facts(&self, path: &Path, id: Uuid, blocks: u64) -> Result<RunTableFacts, TableError> {
        self.host.examine_table(path, blocks, TableName { id, boot: self.boot })
    }
}

impl Evidence for Files<'_> {
    fn block_bytes(&self) -> u32 {
        self.setup.block_bytes
    }

    fn full_image_looks(&self) -> Option<Fingerprint> {
        self.looks(&self.setup.path)
    }

    fn full_image(&self, made_here: bool) -> Result<ImageFacts, ImageError> {
        let (path, read_only) = (&self.setup.path, self.setup.read_only);
        let image = match made_here {
            true => self.probe_made_here(path, read_only, self.setup.block_bytes),
            false => self.probe(path, read_only, self.setup.direct),
        };
        image.map(|image| facts_of(&image))
    }

    fn leg(&self, path: &Path) -> Result<ImageFacts, ImageError> {
        self.probe(path, self.setup.read_only, self.setup.direct).map(|image| facts_of(&image))
    }

    fn layer_image(&self, path: &Path) -> Result<ImageFacts, ImageError> {
        self.probe_made_here(path, false, self.setup.block_bytes).map(|image| facts_of(&image))
    }

    fn pack(&self, path: &Path, id: Uuid, size_bytes: u64, believed: Believed) -> Result<PackFacts, TableError> {
        let image = self.probe_made_here(path, false, Pack::UNIT_BYTES);
        let image = image.map_err(|e| TableError::image(path, &e))?;
        let shape = (size_bytes, self.setup.block_bytes);
        let memory = self.host.memory_for_a_pack();
        let examine = async move |queue: IoQueue| Pack::examine(image, id, shape, believed, memory, &queue).await;
        let found = self.host.block_on(examine);
        found.map_err(|e| TableError::io(path, &e))?
    }

    fn mirror(&self, mirror: &MirrorRecord, usable: &[Uuid], size_bytes: u64) -> Result<PairFacts, PairError> {
        let mut images = Vec::new();
        for leg in mirror.legs.iter().filter(|leg| usable.contains(&leg.id)) {
            let image = self.probe(&leg.path, self.setup.read_only, self.setup.direct)?;
            images.push(LegImage { id: leg.id, image });
        }
        let (id, block_bytes) = (mirror.bitmap, self.setup.block_bytes);
        let bitmap = self.shared(&self.tables.log(id))?;
        let facts = self
            .host
            .block_on(async move |queue| examine_mirror(&images, (bitmap, id), size_bytes, block_bytes, &queue).await);
        facts.map_err(|e| no_ring(&self.tables.log(id), &e))?
    }

    fn looks(&self, path: &Path) -> Option<Fingerprint> {
        self.host.fingerprint(path).ok()
    }

    fn identity(&self, path: &Path) -> Option<Identity> {
        self.host.identity(path).ok()
    }

    fn kept_in(&self) -> Option<Identity> {
        self.identity(self.tables.state_dir())
    }

    fn is_file(&self, path: &Path) -> bool {
        self.host.look(path).is_ok_and(|look| look.kind == FileKind::File)
    }

    fn run_table(&self, id: Uuid, blocks: u64) -> Result<RunTableFacts, TableError> {
        self.run_facts(&self.tables.run(id), id, blocks)
    }

    fn saved_table(&self, id: Uuid, blocks: u64, seal: Uuid) -> Result<(), TableError> {
        self.host.load_table(&Table::in_memory(blocks)?, &self.tables.saved(id), seal)
    }

    fn durable_table(&self, which: Durable, id: Uuid, blocks: u64) -> Result<DurableFacts, TableError> {
        let place = which.place(self.tables, id);
        let image = self.shared(&place).map_err(|e| TableError::image(&place, &e))?;
        let table = Arc::new(Table::in_memory(blocks)?);
        let bits = table.clone();
        let loaded = self.host.block_on(async move |queue| -> Result<LoadReport, TableError> {
            Ok(DurableTable::load(image, id, table, &queue).await?.1)
        });
        let report = loaded.map_err(|e| no_ring(&place, &e))??;
        Ok(DurableFacts { place, damaged: report.damaged, ones: bits.count() })
    }

    fn is_given_up(&self, id: Uuid) -> bool {
        self.host.is_there(&self.tables.given_up(id))
    }

    fn run_changes(&self, id: Uuid, blocks: u64) -> Result<RunTableFacts, TableError> {
        self.run_facts(&self.tables.changed(id), id, blocks)
    }

    fn saved_changes(&self, id: Uuid, blocks: u64, seal: Uuid) -> Result<(), TableError> {
        self.host.load_table(&Table::in_memory(blocks)?, &self.tables.saved_changes(id), seal)
    }

    fn why_broken(&self, id: Uuid) -> Option<String> {
        let reason = self.host.read_note(&self.tables.broken_mark(id)).ok()?;
        Some(reason.trim_matches(['\0', ' ', '\n']).to_owned())
    }
}

impl Durable {
    /// Where the copy is of the table that goes by this name.
    #[must_use]
    pub fn place(self, tables: &TableFiles, id: Uuid) -> PathBuf {
        match self {
            Durable::Log => tables.log(id),
            Durable::Saved => tables.durable(id),
            Durable::GivenUp => tables.given_up(id),
        }
    }
}

fn facts_of(image: &SharedImage) -> ImageFacts {
    let (path, size_bytes) = (image.path().to_owned(), image.size_bytes());
    ImageFacts { path, size_bytes, unit_bytes: image.alignment().offset_bytes }
}

fn no_ring(path: &Path, e: &std::io::Error) -> TableError {
    TableError::Io { path: path.to_owned(), message: format!("no ring: {e}") }
}
