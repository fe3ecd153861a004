//! What to do about a refusal: the commands that clear what stands in the way, in the order in which each of them can be
//! carried out.
//!
//! They are found by carrying them out on a copy of the registry, so what is advised is never refused itself.

use std::fmt;

use super::command::Command;
use super::decide::decide_only;
use super::entity::Registry;
use crate::control::{Name, SnapshotRef};

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A command.
    Run(Command),
    /// Shut the guest of a disk or volume down, or unplug the disk.
    Disconnect(Name),
    /// Shut the guests that read a snapshot down.
    DisconnectReaders(SnapshotRef),
    /// Let the requests from before a cut end.
    WaitForDrain(SnapshotRef),
    /// Put back what a disk lacks.
    PutBack(Name),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // What comes after it finds it gone.
            Step::Run(command @ Command::DeleteSnapshot { .. }) => write!(f, "{command} --wait"),
            Step::Run(command) => command.fmt(f),
            Step::Disconnect(disk) => write!(f, "disconnect the guest of {disk}"),
            Step::DisconnectReaders(snapshot) => write!(f, "disconnect what reads {snapshot}"),
            Step::WaitForDrain(snapshot) => write!(f, "wait until {snapshot} is quiesced"),
            Step::PutBack(disk) => {
                write!(f, "put back what {disk} lacks, and it is served again; or: halfsilver disk forget {disk}")
            }
        }
    }
}

/// How many steps an advice has at most: what needs more is asked for again.
const STEPS_MAX: usize = 4096;
/// How deep things stand on each other at most.
const DEPTH_MAX: usize = 80;

impl Registry {
    /// What makes a command succeed that is refused now. Empty if nothing is known to do that.
    #[must_use]
    pub fn steps_for(&self, command: &Command) -> Vec<Step> {
        let mut world = self.clone();
        let mut steps = Vec::new();
        world.clear(command, &mut steps, 0);
        // What is cleared may take along what the command is about.
        let is_cut_short = steps.len() >= STEPS_MAX;
        let is_cleared = is_cut_short || decide_only(&world, command).is_ok() || world.is_gone(command);
        if is_cleared { steps } else { Vec::new() }
    }

    /// The commands themselves, each with what makes it succeed before it. Empty if nothing is known to do that.
    #[must_use]
    pub fn steps_to(&self, commands: impl IntoIterator<Item = Command>) -> Vec<Step> {
        let mut world = self.clone();
        let mut steps = Vec::new();
        for command in commands {
            world.clear(&command, &mut steps, 0);
            if decide_only(&world, &command).is_err() {
                return Vec::new();
            }
            let step = Step::Run(command);
            world.carry_out(&step);
            steps.push(step);
        }
        steps
    }

    /// Whether what a command deletes has gone by itself.
    fn is_gone(&self, command: &Command) -> bool {
        match command {
            Command::DeleteSnapshot { snapshot, .. } => self.snapshot_named(snapshot).is_none(),
            _ => false,
        }
    }

    /// Carries out what clears the way for `command`, and notes it.
    fn clear(&mut self, command: &Command, steps: &mut Vec<Step>, depth: usize) {
        while steps.len() < STEPS_MAX && depth < DEPTH_MAX {
            let Err(obstacles) = decide_only(self, command) else { return };
            let Some(first) = obstacles.into_iter().find(|obstacle| !obstacle.cleared_by.is_empty()) else { return };
            let before = steps.len();
            for step in first.cleared_by {
                if let Step::Run(wanted) = &step {
                    self.clear(wanted, steps, depth + 1);
                    if decide_only(self, wanted).is_err() {
                        continue; // Something before it has done that already.
                    }
                }
                self.carry_out(&step);
                steps.push(step);
            }
            if steps.len() == before {
                return; // Nothing that is known clears it.
            }
        }
    }
}
