//! What stands in the way of a command at the legs of a disk's mirror (source 002 [0062]): which of them it needs, and what
//! brings that one back.

use std::path::PathBuf;

use super::advice::Step;
use super::command::Command;
use super::entity::{Disk, Leg, LegState, Registry};
use super::obstacle::{Obstacle, ObstacleKind, delete_snapshot};
use crate::control::api::{JobKind, JobState};

impl Registry {
    /// What stands in the way of this command at the legs of this disk.
    pub(super) fn of_legs(&self, command: &Command, disk: &Disk) -> Vec<Obstacle> {
        match command {
            Command::CreateSnapshot { splits: true, .. } => self.in_the_way_of_a_split(disk),
            Command::Mirror { path, .. } => self.in_the_way_of_a_leg(disk, path),
            Command::Unmirror { leg, .. } => self.in_the_way_of_unmirroring(disk, leg.as_ref()),
            _ => Vec::new(),
        }
    }

    /// A split needs two legs in sync.
    fn in_the_way_of_a_split(&self, disk: &Disk) -> Vec<Obstacle> {
        match disk.legs.len() {
            2 => disk.legs.iter().filter_map(|leg| self.not_in_sync(disk, leg)).collect(),
            _ => {
                // A volume has no legs.
                let add = Command::Mirror { disk: disk.name.clone(), path: PathBuf::from("PATH") };
                let steps = if disk.is_volume() { Vec::new() } else { vec![Step::Run(add)] };
                let what = format!("{} has no second leg", disk.title());
                vec![Obstacle { kind: ObstacleKind::NoSecondLeg, what, cleared_by: steps }]
            }
        }
    }

    /// A new leg needs a place; one that is there already is only brought up to date.
    fn in_the_way_of_a_leg(&self, disk: &Disk, path: &PathBuf) -> Vec<Obstacle> {
        let of = |leg: &&Leg| leg.path == *path && matches!(leg.state, LegState::InSync | LegState::Syncing);
        let own = disk.legs.iter().find(of);
        // The one leg of a mirror takes no second place.
        if own.is_some_and(|leg| leg.state == LegState::InSync) && disk.legs.len() > 1 {
            return Vec::new();
        }
        let held = disk.legs.iter().filter(|leg| matches!(leg.state, LegState::Held { .. }));
        let held: Vec<Obstacle> = held.filter_map(|leg| self.not_in_sync(disk, leg)).collect();
        if !held.is_empty() || own.is_some() {
            return held;
        }
        let go =
            |leg: &Leg| vec![Step::Run(Command::Unmirror { disk: disk.name.clone(), leg: Some(leg.path.clone()) })];
        let has_work = |leg: &&Leg| leg.state == LegState::Syncing && !self.is_sync_stopped(disk);
        if let Some(leg) = disk.legs.iter().find(has_work) {
            let what = format!("{}: its leg {} is being synchronised", disk.title(), leg.path.display());
            return vec![Obstacle { kind: ObstacleKind::LegNotInSync, what, cleared_by: go(leg) }];
        }
        match &disk.legs[..] {
            [_, second] if disk.legs.iter().all(|leg| leg.state == LegState::InSync) => {
                let what = format!("{} has two good legs", disk.title());
                vec![Obstacle { kind: ObstacleKind::LegsTaken, what, cleared_by: go(second) }]
            }
            _ => Vec::new(),
        }
    }

    /// The leg that stays must have everything, and the one that goes must be there to go.
    fn in_the_way_of_unmirroring(&self, disk: &Disk, leg: Option<&PathBuf>) -> Vec<Obstacle> {
        let title = disk.title();
        if disk.legs.is_empty() {
            let what = format!("{title} has no second leg");
            return vec![Obstacle { kind: ObstacleKind::NoSecondLeg, what, cleared_by: Vec::new() }];
        }
        let named = leg.map_or(Some(disk.legs.len() - 1), |path| disk.legs.iter().position(|leg| leg.path == *path));
        let Some(at) = named else { return Vec::new() };
        let goes = &disk.legs[at];
        let stays = disk.legs.iter().enumerate().find(|(other, _)| *other != at).map_or(goes, |(_, leg)| leg);
        if matches!(goes.state, LegState::Held { .. }) {
            return self.not_in_sync(disk, goes).into_iter().collect();
        }
        // Only from a leg that has everything can another one get it.
        let is_the_last = goes.state == LegState::InSync && stays != goes;
        match self.not_in_sync(disk, stays) {
            None => Vec::new(),
            Some(obstacle) if is_the_last => {
                let what = format!("{title}: {} is its only good leg; {}", goes.path.display(), obstacle.what);
                vec![Obstacle { what, ..obstacle }]
            }
            Some(Obstacle { what, .. }) => {
                let put_back = vec![Step::PutBack(disk.name.clone())];
                vec![Obstacle { kind: ObstacleKind::LegNotInSync, what, cleared_by: put_back }]
            }
        }
    }

    /// That a leg is not in sync, and what makes it so.
    fn not_in_sync(&self, disk: &Disk, leg: &Leg) -> Option<Obstacle> {
        let (title, path) = (disk.title(), leg.path.display());
        let job = self.job_on(disk.id, |job| job.kind == JobKind::Mirror);
        let hurry = job.filter(|job| job.is_paced).map(|job| Command::HurryJob { job: job.id });
        let mirror = Command::Mirror { disk: disk.name.clone(), path: leg.path.clone() };
        let sync = || hurry.clone().into_iter().chain([mirror.clone()]).map(Step::Run).collect::<Vec<_>>();
        let (kind, what, cleared_by) = match leg.state {
            LegState::InSync => return None,
            LegState::Syncing => (ObstacleKind::LegNotInSync, "is being synchronised".to_owned(), sync()),
            LegState::Failed => (ObstacleKind::LegNotInSync, "has failed".to_owned(), sync()),
            LegState::Held { by } => match self.snapshot(by) {
                // It comes back by itself.
                None => (ObstacleKind::LegNotInSync, "is being synchronised".to_owned(), sync()),
                Some((holder, snapshot)) => {
                    let reference = holder.reference(&snapshot.name);
                    let what = format!("is held by snapshot {reference}");
                    (ObstacleKind::LegHeld, what, vec![Step::Run(delete_snapshot(reference))])
                }
            },
        };
        Some(Obstacle { kind, what: format!("{title}: its leg {path} {what}"), cleared_by })
    }

    /// Whether nobody goes on with the leg that is behind: it gives way to another one.
    fn is_sync_stopped(&self, disk: &Disk) -> bool {
        let job = self.job_on(disk.id, |job| job.kind == JobKind::Mirror);
        job.is_some_and(|job| job.state != JobState::Running)
    }
}
