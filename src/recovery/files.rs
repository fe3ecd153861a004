//! The evidence of real files: looked at as a start would open them, but only to read, and closed again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::{Durable, DurableFacts, Evidence, ImageFacts};
use crate::engine::{LegImage, Pair, PairError, PairFacts};
use crate::image::{Direct, FileImage, Image, ImageError, ImageErrorKind, ImageOptions, SharedImage, block_on};
use crate::store::{
    DurableTable, Fingerprint, LoadReport, MirrorRecord, RunTableFacts, Table, TableError, TableFiles, TableName,
    examine_run_table,
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
#[derive(Debug)]
pub struct Files<'a> {
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
    fn probe(&self, path: &Path, read_only: bool, direct: Direct) -> Result<FileImage, ImageError> {
        FileImage::probe(path, ImageOptions { direct, read_only, lock_wait: self.lock_wait })
    }

    /// Through the page cache where there is no other way.
    fn probe_made_here(&self, path: &Path, read_only: bool) -> Result<FileImage, ImageError> {
        let is_direct = self.setup.direct == Direct::On;
        match self.probe(path, read_only, self.setup.direct) {
            Err(e) if is_direct && e.kind == ImageErrorKind::Unsuitable => self.probe(path, read_only, Direct::Off),
            Ok(image) if image.alignment().offset_bytes > self.setup.block_bytes => {
                drop(image);
                self.probe(path, read_only, Direct::Off)
            }
            other => other,
        }
    }

    /// For a table that is changed in place.
    fn shared(&self, path: &Path) -> Result<SharedImage, ImageError> {
        Ok(Arc::new(self.probe(path, false, Direct::Off)?))
    }

    fn run_facts(&self, path: &Path, id: Uuid, blocks: u64) -> Result<RunTableFacts, TableError> {
        examine_run_table(path, blocks, TableName { id, boot: self.boot })
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
            true => self.probe_made_here(path, read_only),
            false => self.probe(path, read_only, self.setup.direct),
        };
        image.map(|image| facts_of(&image))
    }

    fn leg(&self, path: &Path) -> Result<ImageFacts, ImageError> {
        self.probe(path, self.setup.read_only, self.setup.direct).map(|image| facts_of(&image))
    }

    fn layer_image(&self, path: &Path) -> Result<ImageFacts, ImageError> {
        self.probe_made_here(path, false).map(|image| facts_of(&image))
    }

    fn mirror(&self, mirror: &MirrorRecord, usable: &[Uuid], size_bytes: u64) -> Result<PairFacts, PairError> {
        let mut images = Vec::new();
        for leg in mirror.legs.iter().filter(|leg| usable.contains(&leg.id)) {
            let image: SharedImage = Arc::new(self.probe(&leg.path, self.setup.read_only, self.setup.direct)?);
            images.push(LegImage { id: leg.id, image });
        }
        let (id, block_bytes) = (mirror.bitmap, self.setup.block_bytes);
        let bitmap = self.shared(&self.tables.log(id))?;
        let facts =
            block_on(async move |queue| Pair::examine(&images, bitmap, id, size_bytes, block_bytes, &queue).await);
        facts.map_err(|e| no_ring(&self.tables.log(id), &e))?
    }

    fn looks(&self, path: &Path) -> Option<Fingerprint> {
        Fingerprint::of(path).ok()
    }

    fn is_file(&self, path: &Path) -> bool {
        std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file())
    }

    fn run_table(&self, id: Uuid, blocks: u64) -> Result<RunTableFacts, TableError> {
        self.run_facts(&self.tables.run(id), id, blocks)
    }

    fn saved_table(&self, id: Uuid, blocks: u64, seal: Uuid) -> Result<(), TableError> {
        Table::in_memory(blocks)?.load(&self.tables.saved(id), seal)
    }

    fn durable_table(&self, which: Durable, id: Uuid, blocks: u64) -> Result<DurableFacts, TableError> {
        let place = which.place(self.tables, id);
        let image = self.shared(&place).map_err(|e| TableError::Io { path: place.clone(), message: e.to_string() })?;
        let table = Arc::new(Table::in_memory(blocks)?);
        let loaded = block_on(async move |queue| -> Result<LoadReport, TableError> {
            Ok(DurableTable::load(image, id, table, &queue).await?.1)
        });
        let report = loaded.map_err(|e| no_ring(&place, &e))??;
        Ok(DurableFacts { place, damaged: report.damaged })
    }

    fn is_given_up(&self, id: Uuid) -> bool {
        self.tables.given_up(id).exists()
    }

    fn run_changes(&self, id: Uuid, blocks: u64) -> Result<RunTableFacts, TableError> {
        self.run_facts(&self.tables.changed(id), id, blocks)
    }

    fn saved_changes(&self, id: Uuid, blocks: u64, seal: Uuid) -> Result<(), TableError> {
        Table::in_memory(blocks)?.load(&self.tables.saved_changes(id), seal)
    }

    fn why_broken(&self, id: Uuid) -> Option<String> {
        let reason = std::fs::read(self.tables.broken_mark(id)).ok()?;
        Some(String::from_utf8_lossy(&reason).trim_matches(['\0', ' ', '\n']).to_owned())
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

fn facts_of(image: &FileImage) -> ImageFacts {
    let (path, size_bytes) = (image.path().to_owned(), image.size_bytes());
    ImageFacts { path, size_bytes, unit_bytes: image.alignment().offset_bytes }
}

fn no_ring(path: &Path, e: &std::io::Error) -> TableError {
    TableError::Io { path: path.to_owned(), message: format!("no ring: {e}") }
}
