//! The table of operations and obstacles: what each operation does about each thing that may be the case.
//!
//! An operation that is added has a column here, an obstacle a row: neither can be forgotten, because the table would not
//! compile.

use super::obstacle::ObstacleKind::{self, *};
use crate::control::ErrorCode;

/// What an operation does about an obstacle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It does not mind.
    Fine,
    /// It waits until that is over, for a while.
    Waits,
    /// It is refused unless it is forced.
    Forced,
    /// It is refused until that is over.
    Refused,
    /// It cannot be done to such a thing at all.
    Never,
}

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What is done to a disk, a volume or a snapshot.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Operation { $($(#[$doc])* $name,)* }

        impl Operation {
            /// All of them, in the order of the table's columns.
            pub const ALL: &[Operation] = &[$(Operation::$name,)*];
        }
    };
}

operations! {
    /// A snapshot of it is taken.
    Freeze,
    /// It (a snapshot) goes.
    DeleteSnapshot,
    /// It (a snapshot) is what a volume is made on, or a disk restored from.
    UseSnapshot,
    /// Old frontends of it (a snapshot) are moved over.
    CutOver,
    /// A bookmark of it goes.
    DeleteBookmark,
    /// It is not served any more.
    RemoveDisk,
    /// It is remembered no more, without having been served.
    Forget,
    /// How it is served changes.
    Set,
    /// Whether it can be written changes: nobody may write it from now on, or a volume is meant.
    SetReadOnly,
    /// It gets another name.
    Rename,
    /// It gets a second leg.
    Mirror,
    /// It loses a leg.
    Unmirror,
    /// It becomes larger.
    Resize,
    /// It is taken back to a snapshot.
    Restore,
    /// It and what was written to it goes.
    DeleteVolume,
    /// It is made independent.
    Complete,
    /// It is brought to its source's present.
    Update,
    /// It becomes a disk.
    Promote,
    /// Its socket is closed.
    Disable,
    /// Its socket is opened again.
    Enable,
    /// It begins anew.
    EnableFresh,
    /// It (a snapshot) is read through by what a disk is restored from.
    ReadThrough,
    /// A bookmark stays of it (a snapshot) when it goes.
    LeaveBookmark,
}

#[allow(non_upper_case_globals, reason = "cells of a table")]
const o: Answer = Answer::Fine;
const W: Answer = Answer::Waits;
const F: Answer = Answer::Forced;
const R: Answer = Answer::Refused;
const N: Answer = Answer::Never;

const COLUMNS: usize = Operation::ALL.len();

/// A row for each obstacle; a column for each operation, in the order of their declarations.
#[rustfmt::skip]
const TABLE: [(ObstacleKind, [Answer; COLUMNS]); ObstacleKind::ALL.len()] = [
    //                   freeze      cut over    forget      rename      resize         update         enable
    //                      delete snap.   del. bookmark set      mirror    restore        promote        fresh
    //                         use snapshot   remove disk  set read-only unmirror delete volume disable      read through
    //                                                                                 complete                    bookmark stays
    (Unserved,          [R, R, R, R, R, o, o, R, R, R, R, R, R, R, o, R, R, R, R, R, R, R, o]),
    (Unreadable,        [o, o, o, o, o, F, o, o, o, o, o, o, o, o, F, o, o, o, o, o, o, o, o]),
    (Served,            [o, o, o, o, o, o, N, o, o, o, o, o, o, o, o, o, o, o, o, o, R, o, o]),
    (Disabled,          [o, o, o, o, o, o, N, o, o, o, o, o, o, o, o, o, o, R, o, o, o, o, o]),
    (IsVolume,          [o, o, o, o, o, N, o, o, N, o, N, N, N, N, o, o, o, o, o, o, o, o, o]),
    (OnSnapshot,        [o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, R, o, o, o, o, o]),
    (Independent,       [o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, N, o, o, o, o, N, o, o]),
    (Failed,            [R, o, R, o, o, o, o, o, o, o, R, o, R, R, o, R, o, o, o, o, R, o, o]),
    (ReadOnly,          [o, o, o, o, o, o, o, o, o, o, R, o, R, R, o, o, o, o, o, o, o, o, o]),
    (StoodOn,           [o, R, o, o, o, R, R, o, o, o, o, o, o, o, R, o, o, o, o, o, o, o, o]),
    (MayBeNeeded,       [o, F, o, o, o, F, R, o, o, o, o, o, o, o, F, o, o, o, o, o, o, o, o]),
    (RestoredFrom,      [o, R, o, o, o, R, R, o, o, o, o, o, o, o, R, o, o, o, o, o, o, o, o]),
    (RestoredThrough,   [o, R, o, o, o, R, R, o, o, o, o, o, o, o, R, o, o, o, o, o, o, o, o]),
    (RestoreWaits,      [o, R, o, o, o, F, N, o, o, o, o, o, o, o, F, o, o, o, o, o, o, o, o]),
    (RestoreLost,       [R, R, R, o, o, F, o, R, R, o, R, R, R, R, o, o, R, o, o, o, o, o, o]),
    (Restoring,         [R, R, o, o, o, R, o, o, R, o, R, R, R, R, o, o, R, o, o, o, o, o, o]),
    (Working,           [o, R, o, o, o, R, o, o, R, o, o, o, o, R, R, o, R, o, o, o, R, o, o]),
    (WorkLeft,          [o, o, o, o, o, o, o, o, R, o, o, o, o, R, o, o, o, o, o, o, o, o, o]),
    (Syncing,           [o, o, o, o, o, R, o, o, R, o, o, o, R, o, R, o, o, o, o, o, o, o, o]),
    (GivingBack,        [o, o, o, o, o, R, o, o, R, o, o, o, o, R, R, o, R, o, o, o, o, o, o]),
    (Going,             [o, o, N, N, o, R, o, o, R, o, o, o, o, R, R, R, R, o, o, o, R, R, o]),
    (GoingStopped,      [o, o, N, N, o, o, o, o, R, o, o, o, o, R, o, R, R, o, o, o, R, R, o]),
    (OldFrontends,      [o, F, R, o, o, o, o, o, o, o, o, o, R, R, o, o, o, o, o, o, o, o, o]),
    (Draining,          [o, W, W, o, o, o, o, o, o, o, o, o, W, R, o, o, o, o, o, o, o, o, o]),
    (Broken,            [o, o, N, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, N]),
    (ReadBy,            [o, F, o, o, o, F, o, o, o, o, o, o, o, o, F, o, o, o, o, o, o, o, o]),
    (Attached,          [o, o, o, o, o, F, o, o, o, o, o, o, o, F, F, o, F, o, F, o, o, o, o]),
    (NamedSocket,       [o, o, o, o, o, o, o, o, o, F, o, o, o, o, o, o, o, o, o, o, o, o, o]),
    (HasSnapshots,      [o, o, o, o, o, F, o, o, o, o, o, o, o, o, F, o, R, o, o, o, R, o, o]),
    (HasBookmarks,      [o, o, o, o, o, F, o, o, o, o, o, o, o, o, F, o, R, o, o, o, R, o, o]),
    (LeftBookmarks,     [o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, R, o, o, o, R, o, o]),
    (InLog,             [o, o, o, o, o, R, o, o, R, o, o, o, R, o, o, o, o, o, o, o, o, o, o]),
    (Mirrored,          [o, o, o, o, o, o, o, o, R, o, o, o, R, o, o, o, o, o, o, o, o, o, o]),
    (GiveBackLeft,      [o, o, o, o, o, o, o, o, R, o, o, o, o, o, o, o, o, o, o, o, o, o, o]),
    (LeavesNone,        [o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, o, N]),
    (NoSecondLeg,        [R, o, o, o, o, o, o, o, o, o, o, N, o, o, o, o, o, o, o, o, o, o, o]),
    (LegHeld,            [R, o, o, o, o, o, o, o, o, o, R, R, o, o, o, o, o, o, o, o, o, o, o]),
    (LegNotInSync,       [R, o, o, o, o, o, o, o, o, o, R, R, o, o, o, o, o, o, o, o, o, o, o]),
    (LegsTaken,          [o, o, o, o, o, o, o, o, o, o, R, o, o, o, o, o, o, o, o, o, o, o, o]),
    (NameTaken,          [R, R, R, R, R, R, R, R, R, R, R, R, R, R, R, R, R, R, R, R, R, R, R]),
];

/// The rows stand where their obstacles do.
const _: () = {
    let mut at = 0;
    while at < TABLE.len() {
        assert!(TABLE[at].0 as usize == at && ObstacleKind::ALL[at] as usize == at);
        at += 1;
    }
};

impl Operation {
    /// What it does about an obstacle.
    #[must_use]
    pub fn about(self, kind: ObstacleKind) -> Answer {
        TABLE[kind as usize].1[self as usize]
    }

    /// The code of its refusal because of such an obstacle.
    #[must_use]
    pub fn code(self, kind: ObstacleKind) -> ErrorCode {
        match (self, kind) {
            (_, Unserved | Failed | RestoreLost) if self != Operation::DeleteVolume => ErrorCode::DiskFailed,
            (_, Broken) => ErrorCode::SnapshotBroken,
            (Operation::Resize, Mirrored | InLog) => ErrorCode::Unsupported,
            (_, ReadOnly | Mirrored) => ErrorCode::InvalidConfig,
            (_, NoSecondLeg) => ErrorCode::NoSecondLeg,
            (Operation::Freeze | Operation::Mirror, LegHeld) | (_, LegNotInSync) => ErrorCode::MirrorNotInSync,
            (_, LegsTaken) => ErrorCode::Conflict,
            (Operation::RemoveDisk, IsVolume) => ErrorCode::DiskNotFound,
            (_, IsVolume) | (Operation::EnableFresh, Independent) => ErrorCode::Unsupported,
            (Operation::Complete, Independent) => ErrorCode::Conflict,
            (
                Operation::DeleteVolume
                | Operation::Complete
                | Operation::Update
                | Operation::Promote
                | Operation::Disable
                | Operation::Enable
                | Operation::EnableFresh,
                _,
            ) => ErrorCode::VolumeBusy,
            (
                Operation::DeleteSnapshot
                | Operation::UseSnapshot
                | Operation::ReadThrough
                | Operation::CutOver
                | Operation::DeleteBookmark
                | Operation::LeaveBookmark,
                _,
            ) => ErrorCode::SnapshotBusy,
            _ => ErrorCode::DiskBusy,
        }
    }

    /// What can be done besides clearing such an obstacle.
    #[must_use]
    pub fn besides(self, kind: ObstacleKind) -> Option<&'static str> {
        let is_of_split = self == Operation::Freeze && matches!(kind, NoSecondLeg | LegHeld | LegNotInSync);
        is_of_split.then_some("take it with another strategy")
    }

    /// What to do instead of what can never be done.
    #[must_use]
    pub fn instead(self, kind: ObstacleKind, (name, is_volume): (&str, bool)) -> String {
        match (self, kind) {
            (Operation::RemoveDisk, _) => format!("delete it as a volume: halfsilver volume delete {name}"),
            (Operation::Forget, _) if is_volume => format!("delete it instead: halfsilver volume delete {name}"),
            (Operation::Forget, _) => format!("remove it instead: halfsilver disk remove {name}"),
            (Operation::Unmirror, NoSecondLeg) => format!("nothing is to be done: see 'halfsilver disk show {name}'"),
            (Operation::Mirror | Operation::Unmirror | Operation::Resize, _) => {
                format!(
                    "make it a disk first: 'halfsilver volume complete {name} --wait', then 'volume promote {name}'"
                )
            }
            (Operation::SetReadOnly, _) => {
                format!("read a snapshot of it: halfsilver snapshot create NAME --disk {name}")
            }
            (Operation::LeaveBookmark, Broken) => "delete it without a bookmark".to_owned(),
            (Operation::LeaveBookmark, _) => {
                "leave --keep-bookmark out; the next backup has to copy everything".to_owned()
            }
            (Operation::UseSnapshot | Operation::CutOver, Going | GoingStopped) => {
                "name another snapshot, or take one".to_owned()
            }
            (Operation::Restore, _) => "make another volume off the snapshot: halfsilver volume create".to_owned(),
            (Operation::Complete, _) => format!("nothing is to be done: see 'halfsilver volume show {name}'"),
            (Operation::EnableFresh, _) => {
                format!("enable it as it is: 'halfsilver volume enable {name}', or delete it and make another")
            }
            _ => self.code(kind).action().to_owned(),
        }
    }
}
