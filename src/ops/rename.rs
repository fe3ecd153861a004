//! Another name for a disk or volume that is served.
//!
//! What always holds:
//! - All that belongs to it goes by its id, and images keep the names that they have: only the name itself and the sockets
//!   that are called after it change.
//! - The sockets are moved before the record, and the record changes its name in one transaction: whenever this is cut off,
//!   a start finds one name whole, and clears what is left of the sockets of the other one.
//! - Frontends that are connected stay connected.

use std::path::PathBuf;
use std::sync::Arc;

use crate::control::api;
use crate::control::{ApiError, ErrorCode, EventKind, Name, Notice, SnapshotRef};
use crate::crash;
use crate::manager::entry::{DiskEntry, SnapshotEntry, locked};
use crate::manager::{Manager, record_error};
use crate::registry::{ClaimKey, Command, decide};
use crate::vhost_user::Server;

/// The sockets that are called after a disk, and where they go.
struct Moves {
    disk: Option<PathBuf>,
    snapshots: Vec<(Arc<SnapshotEntry>, PathBuf)>,
}

impl Moves {
    fn targets(&self) -> impl Iterator<Item = &PathBuf> {
        self.disk.iter().chain(self.snapshots.iter().map(|(_, path)| path))
    }
}

/// A socket that is open: its server, where it is, and where it goes.
type Move = (Arc<dyn Server>, PathBuf, PathBuf);

impl Manager {
    pub(crate) fn rename_plain_disk(&self, name: &Name, to: &Name, force: bool) -> Result<api::Disk, ApiError> {
        self.plain_disk(name)?;
        let command = Command::Rename { disk: name.clone(), to: to.clone(), is_volume: false, force };
        Ok(self.rename(name, to, &command)?.to_api(self))
    }

    pub(crate) fn rename_served_volume(&self, name: &Name, to: &Name, force: bool) -> Result<api::Volume, ApiError> {
        self.volume(name)?;
        let command = Command::Rename { disk: name.clone(), to: to.clone(), is_volume: true, force };
        Ok(self.rename(name, to, &command)?.to_volume(self))
    }

    fn rename(&self, name: &Name, to: &Name, command: &Command) -> Result<Arc<DiskEntry>, ApiError> {
        let force = command.is_forced();
        let _claim = self.claim_with(command, [ClaimKey::Path(self.places.disk_socket(to))])?;
        let disk = self.disk(name)?;
        if name == to {
            return Ok(disk);
        }
        let moves = self.moves_of(&disk, to);
        for path in moves.targets() {
            let refused = |e: ApiError| {
                ApiError::new(ErrorCode::Conflict, format!("{name}: {}", e.message)).with_action("use another name")
            };
            self.check_place(path).map_err(refused)?;
        }
        let open = open_sockets(&disk, &moves);
        {
            // A frontend that comes from here on finds the sockets at their new places, or keeps them where they are.
            let _away: Vec<_> = open.iter().filter(|_| !force).map(|(server, ..)| server.hold()).collect();
            if !force {
                decide(&self.registry(), command)?;
            }
            self.move_and_record(&disk, to, &moves, &open)?;
        }
        crash::point("after a disk was renamed");
        log::info!("{name}: called {to} from now on");
        self.bus.publish(Notice::of_disk(EventKind::DiskRenamed, to).because(name.as_str()));
        Ok(disk)
    }

    fn moves_of(&self, disk: &DiskEntry, to: &Name) -> Moves {
        let named = disk.snapshots().into_iter().filter(|snapshot| snapshot.is_socket_named(&self.places));
        let moved = |snapshot: Arc<SnapshotEntry>| {
            let reference = SnapshotRef { disk: to.clone(), name: snapshot.name.clone() };
            (snapshot, self.places.snapshot_socket(&reference))
        };
        Moves {
            disk: disk.is_socket_named(&self.places).then(|| self.places.disk_socket(to)),
            snapshots: named.map(moved).collect(),
        }
    }

    fn move_and_record(&self, disk: &DiskEntry, to: &Name, moves: &Moves, open: &[Move]) -> Result<(), ApiError> {
        let name = disk.name.get();
        let mut record = disk.to_record();
        to.as_str().clone_into(&mut record.name);
        let mut config = disk.config();
        config.socket = moves.disk.clone().or(config.socket);
        record.config = serde_json::to_value(&config).expect("a configuration is plain data");
        for (snapshot, path) in &moves.snapshots {
            record.snapshots.iter_mut().filter(|s| s.id == snapshot.id).for_each(|s| s.socket.clone_from(path));
        }
        // What guests know it by does not change with its name, whatever a configuration leaves out.
        let mut set = locked(&disk.relations).set.clone();
        set.serial.clone_from(&config.serial);
        record.set = serde_json::to_value(&set).expect("settings are plain data");

        crash::point("before the sockets of a disk are moved");
        for (moved, (server, _, path)) in open.iter().enumerate() {
            if let Err(e) = server.move_socket(path) {
                move_back(&open[..moved]);
                return Err(ApiError::new(ErrorCode::Conflict, format!("{name}: {e}")).with_action("use another name"));
            }
        }
        crash::point("after the sockets of a disk were moved");
        if let Err(e) = self.records.rename(name.as_str(), &record) {
            move_back(open);
            return Err(record_error(e));
        }
        locked(&disk.relations).set = set;
        for (snapshot, path) in &moves.snapshots {
            locked(&snapshot.record).socket.clone_from(path);
        }
        if let Some(path) = &moves.disk {
            locked(&disk.socket).clone_from(path);
        }
        let mut disks = locked(&self.disks);
        if let Some(entry) = disks.remove(&name) {
            disk.name.set(to.clone());
            disks.insert(to.clone(), entry);
        }
        drop(disks);
        tell_servers(disk);
        Ok(())
    }
}

/// Those of the sockets that are open now. One that is opened later is opened where its record says.
fn open_sockets(disk: &DiskEntry, moves: &Moves) -> Vec<Move> {
    let own = moves.disk.iter().filter_map(|to| Some((locked(&disk.server).clone()?, disk.socket(), to.clone())));
    let of_snapshot = |(snapshot, to): &(Arc<SnapshotEntry>, PathBuf)| {
        let server = locked(&snapshot.server).clone()?;
        Some((server, locked(&snapshot.record).socket.clone(), to.clone()))
    };
    own.chain(moves.snapshots.iter().filter_map(of_snapshot)).collect()
}

fn move_back(moved: &[Move]) {
    for (server, from, _) in moved {
        if let Err(e) = server.move_socket(from) {
            log::error!("a socket is not where it was any more: {e}");
        }
    }
}

/// The log speaks of the next frontends by the new name.
fn tell_servers(disk: &DiskEntry) {
    if let Some(server) = &*locked(&disk.server) {
        server.rename(disk.name.to_string());
    }
    for snapshot in disk.snapshots() {
        if let Some(server) = &*locked(&snapshot.server) {
            server.rename(snapshot.reference().to_string());
        }
    }
}
