//! The daemon's steps with the legs of a mirror (`src/ops/mirror_disk.rs`).

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use halfsilver::engine::{Backing, LegImage, LegState, Pair};
use halfsilver::image::{IoQueue, SharedImage};
use halfsilver::job::{self, Outcome, Pace};
use halfsilver::recovery::{LegUse, Recovery};
use halfsilver::store::{LegRecord, MirrorRecord};
use uuid::Uuid;

use super::{Daemon, Entry, log_table};
use crate::host::Host;
use crate::run::{Shape, Slip};

/// The mirror of a disk (`mirror::Mirror`).
pub(super) struct Mirror {
    bitmap: Uuid,
    pub(super) pair: Arc<Pair>,
    pub(super) legs: Vec<(LegRecord, Option<SharedImage>)>,
}

impl Mirror {
    pub(super) fn to_record(&self) -> MirrorRecord {
        MirrorRecord {
            bitmap: self.bitmap,
            legs: self.legs.iter().map(|(leg, _)| leg.clone()).collect(),
            stopped: false,
        }
    }

    fn state_of(&self, id: Uuid) -> Option<LegState> {
        self.pair.status().into_iter().find(|leg| leg.id == id).map(|leg| leg.state)
    }
}

impl Daemon {
    /// `Manager::after_split`.
    pub(super) async fn after_split(&self, entry: &Entry, image: Option<SharedImage>) {
        let _phase = self.phases.begin("a leg's coming back");
        let path = entry.record.borrow().image.clone();
        match image {
            Some(image) => self.rejoin(&path, image).await,
            None => self.lose_leg(&path).await,
        }
    }

    /// `Manager::rejoin`.
    async fn rejoin(&self, path: &Path, image: SharedImage) {
        let found = self.mirror.borrow().as_ref().and_then(|m| {
            let (leg, _) = m.legs.iter().find(|(leg, _)| leg.path == path)?;
            Some((m.pair.clone(), leg.id))
        });
        let Some((pair, id)) = found else { return };
        if let Err(e) = pair.attach(&self.queue, LegImage { id, image: image.clone() }, false).await {
            return self.fail(format!("a leg does not come back: {e}"));
        }
        if let Some(mirror) = self.mirror.borrow_mut().as_mut() {
            mirror.legs.iter_mut().filter(|(leg, _)| leg.id == id).for_each(|(_, place)| *place = Some(image.clone()));
        }
        self.start_resync(pair);
    }

    /// `Manager::lose_leg` and `Manager::let_leg_go`.
    async fn lose_leg(&self, path: &Path) {
        let found = self.mirror.borrow_mut().as_mut().and_then(|mirror| {
            let at = mirror.legs.iter().position(|(leg, _)| leg.path == path)?;
            Some((mirror.legs.remove(at).0, mirror.legs[0].0.path.clone(), mirror.pair.clone()))
        });
        let Some((gone, stays, pair)) = found else { return };
        if *self.path.borrow() == gone.path {
            *self.path.borrow_mut() = stays;
        }
        self.former_legs.borrow_mut().push(gone.path);
        self.persist().await;
        if let Err(e) = pair.forget(&self.queue, gone.id).await {
            self.fail(e.to_string());
        }
    }

    /// `Manager::add_leg`, where the mirror has lost its second leg.
    pub async fn add_leg(&self) {
        let _structure = self.structure.lock().await;
        let pair = self.mirror.borrow().as_ref().filter(|m| m.legs.len() == 1).map(|m| m.pair.clone());
        let Some(pair) = pair else { return };
        let _phase = self.phases.begin("a new leg");
        let id = self.new_id();
        let path = PathBuf::from(format!("legs/{id}"));
        let size = usize::try_from(self.disk.geometry().size_bytes).unwrap();
        let image: SharedImage = Arc::new(self.host.borrow_mut().create_file(&path, size));
        if self.shape.slip != Some(Slip::LegNotNamed) {
            halfsilver::image::sync(&*image, &self.queue).await.unwrap();
            Host::sync_directory_of(&self.host, &path).await;
        }
        let leg = LegRecord { id, path, saved: None };
        self.mirror.borrow_mut().as_mut().unwrap().legs.push((leg, Some(image.clone())));
        self.persist().await;
        if let Err(e) = pair.attach(&self.queue, LegImage { id, image }, true).await {
            return self.fail(format!("a leg cannot be added: {e}"));
        }
        self.start_resync(pair);
    }

    /// `Manager::start_resync`.
    fn start_resync(&self, pair: Arc<Pair>) {
        if self.resyncs.replace(true) {
            return;
        }
        let daemon = self.me();
        self.begin(async move {
            let _phase = daemon.phases.begin("a resync");
            let done = job::resync(daemon.queue.clone(), daemon.disk.clone(), pair, Arc::new(Pace::default())).await;
            daemon.resyncs.set(false);
            if !matches!(done, Ok(Outcome::Done)) {
                daemon.fail(format!("a resync ended with {done:?}"));
            }
        });
    }

    /// `Manager::clean_mirrors`.
    pub async fn clean(&self) {
        let pair = self.mirror.borrow().as_ref().map(|m| m.pair.clone()).filter(|p| p.marked_bytes() > 0);
        let Some(pair) = pair else { return };
        if self.cleans.replace(true) {
            return;
        }
        let _phase = self.phases.begin("a cleaning of the bitmap");
        if let Err(e) = pair.clean(&self.queue, self.disk.block_locks()).await {
            self.fail(e.to_string());
        }
        self.cleans.set(false);
    }

    /// `Manager::resume_mirror`.
    pub(super) async fn resume_mirror(&self) {
        let behind = self.mirror.borrow().as_ref().and_then(|mirror| {
            let is_split = |leg: &LegRecord| mirror.state_of(leg.id) == Some(LegState::Split);
            let split = mirror.legs.iter().find(|(leg, _)| is_split(leg) && !self.holds_leg(&leg.path));
            if let Some((leg, image)) = split {
                return image.clone().map(|image| (mirror.pair.clone(), Some(LegImage { id: leg.id, image })));
            }
            let resyncs = |(leg, _): &&(LegRecord, _)| mirror.state_of(leg.id) == Some(LegState::Resynchronising);
            mirror.legs.iter().find(resyncs).map(|_| (mirror.pair.clone(), None))
        });
        let Some((pair, back)) = behind else { return };
        if let Some(leg) = back
            && let Err(e) = pair.attach(&self.queue, leg, false).await
        {
            return self.fail(format!("a leg does not come back: {e}"));
        }
        self.start_resync(pair);
    }

    /// `DiskEntry::holds_leg`.
    fn holds_leg(&self, path: &Path) -> bool {
        let chain = self.disk.chain();
        let holds = |backing: &Backing| matches!(backing, Backing::One(image) if image.path() == path);
        chain.links()[..chain.live()].iter().any(|link| holds(&link.layer.image))
    }

    /// The states of the legs and their paths.
    pub fn legs(&self) -> Vec<(PathBuf, LegState)> {
        let mirror = self.mirror.borrow();
        let Some(mirror) = mirror.as_ref() else { return Vec::new() };
        let state = |leg: &LegRecord| Some((leg.path.clone(), mirror.state_of(leg.id)?));
        mirror.legs.iter().filter_map(|(leg, _)| state(leg)).collect()
    }
}

/// `Manager::open_base`.
pub(super) async fn open_base(
    host: &Rc<RefCell<Host>>,
    recovery: &Recovery,
    path: &Path,
    shape: Shape,
    queue: &IoQueue,
) -> Result<(Backing, Option<Mirror>), String> {
    let Some((mirror, decided)) = recovery.record.mirror.as_ref().zip(recovery.mirror.as_ref()) else {
        return Ok((Backing::One(host.borrow().open(path)?), None));
    };
    let (mut legs, mut images) = (Vec::new(), Vec::new());
    for (leg, (_, what)) in mirror.legs.iter().zip(&decided.legs) {
        let image = match what {
            LegUse::InUse(_) => Some(host.borrow().open(&leg.path)?),
            LegUse::Held | LegUse::Forgotten | LegUse::Unused(_) => None,
        };
        images.extend(image.clone().map(|image| LegImage { id: leg.id, image }));
        if *what != LegUse::Forgotten {
            legs.push((leg.clone(), image));
        }
    }
    let bitmap = host.borrow().open(&log_table(mirror.bitmap))?;
    let pair = Pair::open(&images, bitmap, mirror.bitmap, shape.block, queue).await.map_err(|e| e.to_string())?;
    Ok((Backing::Pair(pair.clone()), Some(Mirror { bitmap: mirror.bitmap, pair, legs })))
}
