//! The grammar of the command line. Help, completions and man pages all come from here.
//!
//! It knows words and forms only: names, choices, and which options exclude each other.

mod values;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use uuid::Uuid;

use crate::control::api::{
    BookmarkState, DiskState, Glob, JobKind, JobState, Layout, SnapshotState, Strategy, VolumeSource, VolumeState,
    Writers,
};
use crate::control::{Name, SnapshotRef};
use crate::daemon::config::RawDisk;

pub(super) use values::{MomentArg, PaceArgs, PageArgs, SetArgs, SizeArg, WaitLimit};
use values::{block_size, one_of, span, switch};

/// Serves disks to virtual machines over vhost-user and freezes them into snapshots without a pause.
#[derive(Debug, Parser)]
#[command(name = "halfsilver", version, arg_required_else_help = true, disable_help_subcommand = true)]
#[command(after_help = "Exit status: 0 done, 1 refused or failed (one line on stderr), 2 usage.")]
pub(super) struct Cli {
    /// The daemon's control socket [default: /run/halfsilver/control.sock, or $XDG_RUNTIME_DIR/halfsilver/control.sock]
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "HALFSILVER_CONTROL",
        hide_env_values = true,
        display_order = 900
    )]
    pub(super) control: Option<PathBuf>,
    /// Print JSON: an array for a list, an object otherwise, one object a line for what goes on
    #[arg(long, global = true, display_order = 901)]
    pub(super) json: bool,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run the daemon
    Serve(ServeArgs),
    /// Examine a state directory while no daemon runs: what is wrong, what is safe, what to do
    ///
    /// Says for each disk and each snapshot what a start would do with it. Changes nothing without --repair. Exit status 1
    /// when something is wrong.
    Check(CheckArgs),
    #[command(flatten)]
    Client(ClientCommand),
    /// Print a shell's completion script
    Completions { shell: Shell },
    /// Print the manual page, or write those of all commands to a directory
    Man {
        /// Write one page a command here
        #[arg(long)]
        dir: Option<PathBuf>,
    },
}

/// What is asked of a running daemon.
#[derive(Debug, Subcommand)]
pub(super) enum ClientCommand {
    /// List, add, set, rename, mirror, restore, remove, forget and accept disks
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Take, list, cut over and delete snapshots
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Make, compare, complete, set, rename, promote, disable and delete volumes: disks that guests can write, made off snapshots at once
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// List and forget bookmarks: what is left of deleted snapshots, to know what has changed since
    #[command(subcommand)]
    Bookmark(BookmarkCommand),
    /// List, pace, stop and resume background copying
    #[command(subcommand)]
    Job(JobCommand),
    /// Show everything at a glance
    Status {
        /// Show it again every second
        #[arg(long)]
        watch: bool,
    },
    /// Follow what happens from now on
    Events,
}

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// A TOML file with the keys control, state-dir, run-dir and [[disk]] tables; the command line beats it
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Where records and tables are [default: /var/lib/halfsilver, or $XDG_STATE_HOME/halfsilver]
    #[arg(long, value_name = "DIR")]
    pub(super) state_dir: Option<PathBuf>,
    /// Where sockets are [default: /run/halfsilver, or $XDG_RUNTIME_DIR/halfsilver]
    #[arg(long, value_name = "DIR")]
    pub(super) run_dir: Option<PathBuf>,
    /// A disk to serve: name=vm1,path=vm1.raw, and if wanted mirror=other.raw, socket=vm1.sock, queues=2, direct=off,
    /// readonly=on, shared=on, durability=power, layout=packed, serial=S, block-size=4K and background=128K, all joined by
    /// commas; a comma inside a value is written twice
    #[arg(long = "disk", value_name = "KEY=VALUE,...")]
    pub(super) disks: Vec<RawDisk>,
    /// Take of this disk what was flushed last, as after a power cut, when the run directory was lost with the newest
    /// entries of its log; guests that were running on it must be started anew
    #[arg(long, value_name = "DISK")]
    pub(super) take_flushed: Vec<Name>,
    /// Do not start if a disk of the configuration cannot be served; without this the others are served
    #[arg(long)]
    pub(super) strict: bool,
}

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// The configuration file of the daemon, for its state-dir and run-dir
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Where records and tables are [default: /var/lib/halfsilver, or $XDG_STATE_HOME/halfsilver]
    #[arg(long, value_name = "DIR")]
    pub(super) state_dir: Option<PathBuf>,
    /// Where sockets are [default: /run/halfsilver, or $XDG_RUNTIME_DIR/halfsilver]
    #[arg(long, value_name = "DIR")]
    pub(super) run_dir: Option<PathBuf>,
    /// Repair what can be repaired without losing anything, and say what was
    #[arg(long)]
    pub(super) repair: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum DiskCommand {
    /// List all disks, also those that are remembered and not served
    List {
        /// Only those in this state
        #[arg(long, value_parser = one_of(DiskState::ALL, DiskState::as_str))]
        state: Option<DiskState>,
        /// Only those of this name; * stands for any text
        #[arg(long, value_name = "GLOB")]
        name: Option<Glob>,
        #[command(flatten)]
        page: PageArgs<Name>,
    },
    /// Show one disk
    Show { disk: Name },
    /// Serve a disk; doing so twice with the same configuration is no error
    Add(Box<DiskAddArgs>),
    /// Change how a disk is served, now and after the next start of the daemon
    ///
    /// Durability and layout count for the next snapshots, background at once; queues, readonly and serial for the next frontend that
    /// connects. What --disk or the configuration file says of a key beats what was set.
    Set {
        disk: Name,
        #[command(flatten)]
        set: SetArgs,
        /// Let guests only read
        #[arg(long, value_name = "on|off", value_parser = switch)]
        readonly: Option<bool>,
    },
    /// Make a disk larger under its guest, which is told; snapshots and bookmarks keep their size
    ///
    /// Its image file grows with it; a block device has to have the new size already. Ask for the whole size, or for what it
    /// gets in addition. In the guest, partition and file system are grown after that.
    Resize {
        disk: Name,
        /// The new size in bytes, or with K, M, G or T, such as 200G; with a +, what is added
        #[arg(long, value_name = "200G|+50G", allow_hyphen_values = true)]
        size: SizeArg,
    },
    /// Give a disk another name; its snapshots, bookmarks, volumes, jobs and guests stay with it
    Rename {
        #[arg(value_name = "OLD")]
        disk: Name,
        #[arg(value_name = "NEW")]
        to: Name,
        /// Also while a frontend is connected to a socket that is called after the disk, and moves with its name
        #[arg(long)]
        force: bool,
    },
    /// Forget a disk or volume that is not served, with its snapshots and all that was made for it; a disk's image stays
    Forget { disk: Name },
    /// Serve a disk or volume whose images are others than they were: say that they are copies of those
    Accept { disk: Name },
    /// Stop serving a disk; its image stays
    Remove {
        disk: Name,
        /// Even if a frontend is connected or snapshots exist
        #[arg(long)]
        force: bool,
    },
    /// Give a disk a second leg, or replace the failed one; a job makes it equal to the first, and then keeps it so
    Mirror {
        disk: Name,
        /// The image that becomes the leg; whatever it holds is overwritten
        path: PathBuf,
        /// Return only when it is in sync
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        limit: WaitLimit,
    },
    /// Let a leg of a disk go; its file stays as a plain raw image
    Unmirror {
        disk: Name,
        /// Which one [default: the second]
        #[arg(long, value_name = "PATH")]
        leg: Option<PathBuf>,
    },
    /// Take a disk back to an older point in time: it shows that at once, and a job copies what differs
    ///
    /// Shut the guest down first. What the disk has now is gone afterwards; take a snapshot of it before if it may be wanted.
    Restore {
        /// The disk
        disk: Name,
        /// A snapshot of the disk, or a volume that stands on one or once did
        #[arg(long, value_name = "DISK@NAME|VOLUME")]
        from: VolumeSource,
        /// Even if a frontend is connected, whose guest may hold old content in memory
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        pace: PaceArgs,
        /// Return only when all is copied
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        limit: WaitLimit,
    },
}

#[derive(Debug, Args)]
pub(super) struct DiskAddArgs {
    /// The disk's name, or all of it as serve --disk takes it: name=vm1,path=vm1.raw,...
    #[arg(value_name = "NAME|KEY=VALUE,...")]
    pub(super) disk: String,
    /// The image: a raw file or block device
    #[arg(long)]
    pub(super) path: Option<PathBuf>,
    /// A second image, the other leg of a mirror
    #[arg(long, value_name = "PATH")]
    pub(super) mirror: Option<PathBuf>,
    /// The vhost-user socket [default: <run-dir>/<disk>.sock]
    #[arg(long)]
    pub(super) socket: Option<PathBuf>,
    /// The most virtqueues a frontend may use, 1 to 16
    #[arg(long)]
    pub(super) queues: Option<String>,
    /// Open the image with O_DIRECT
    #[arg(long, value_name = "on|off")]
    pub(super) direct: Option<String>,
    /// Let guests only read
    #[arg(long, value_name = "on|off", num_args = 0..=1, default_missing_value = "on", require_equals = true)]
    pub(super) readonly: Option<String>,
    /// Let several frontends be connected at the same time
    #[arg(long, value_name = "on|off", num_args = 0..=1, default_missing_value = "on", require_equals = true)]
    pub(super) shared: Option<String>,
    /// What snapshots outlive: process, the daemon's end; power, also a power cut, at the price of syncs at first writes
    #[arg(long, value_name = "process|power")]
    pub(super) durability: Option<String>,
    /// How the blocks of snapshots lie in their images, and those of logs: sparse, each at its own place; packed, one after
    /// the other as they came [default: auto, the daemon's choice]
    #[arg(long, value_name = "auto|sparse|packed")]
    pub(super) layout: Option<String>,
    /// What the guest sees as the serial
    #[arg(long)]
    pub(super) serial: Option<String>,
    /// The size of the blocks that tables count in, 4K to 1M
    #[arg(long, value_name = "SIZE")]
    pub(super) block_size: Option<String>,
    /// The size of the sectors that guests see for the life of the disk, 512 or 4096 [default: 512]
    #[arg(long, value_name = "512|4096")]
    pub(super) logical_block_size: Option<String>,
    /// How many data segments a request is told to have, for guests with small rings [default: 126]
    #[arg(long, value_name = "N")]
    pub(super) segments_max: Option<String>,
    /// What guests' discards are best multiples of [default: 32K]
    #[arg(long, value_name = "SIZE")]
    pub(super) discard_granularity: Option<String>,
    /// What one range of a guest's discard is told to have at most [default: 1024M]
    #[arg(long, value_name = "SIZE")]
    pub(super) discard_max: Option<String>,
    /// The most that backups and jobs have in flight while the guest is at work; off for no limit [default: 128K]
    #[arg(long, value_name = "SIZE|off")]
    pub(super) background: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum SnapshotCommand {
    /// Freeze one or more disks at one instant
    Create(SnapshotCreateArgs),
    /// List all snapshots
    List {
        /// Only those of this disk or volume; * stands for any text
        #[arg(long, value_name = "GLOB")]
        disk: Option<Glob>,
        /// Only those in this state
        #[arg(long, value_parser = one_of(SnapshotState::ALL, SnapshotState::as_str))]
        state: Option<SnapshotState>,
        /// Only those of this cut
        #[arg(long, value_name = "ID")]
        group: Option<Uuid>,
        /// Only those that are stored so
        #[arg(long, value_parser = one_of(Strategy::ALL, Strategy::as_str))]
        strategy: Option<Strategy>,
        /// Only those of this name, without the disk; * stands for any text
        #[arg(long, value_name = "GLOB")]
        name: Option<Glob>,
        #[command(flatten)]
        page: PageArgs<SnapshotRef>,
    },
    /// Show one snapshot
    Show {
        #[arg(value_name = "DISK@NAME|ID")]
        snapshot: MomentArg,
    },
    /// List what differs between a snapshot or bookmark and a later one, or the present
    ///
    /// Prints ranges of bytes; all others are equal. What was written with the bytes that were there already may be listed
    /// too, and so is the rest of its block.
    Diff {
        /// The older one: a snapshot or bookmark, DISK@NAME or its id
        #[arg(value_name = "FROM")]
        from: MomentArg,
        /// The later one, of the same disk, DISK@NAME or its id [default: the present]
        #[arg(value_name = "TO")]
        to: Option<MomentArg>,
    },
    /// Move the frontends that still write a snapshot over to the live disk, without a reconnect
    ///
    /// This is for snapshots with --writers connection: a frontend from before the cut goes on writing the snapshot (VLUN
    /// A) until it disconnects or is moved. The move is a cut by itself; a snapshot without such frontends is left as it is.
    Cutover {
        #[arg(value_name = "DISK@NAME")]
        snapshot: SnapshotRef,
        /// Return only when it is quiesced and its socket is open
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        limit: WaitLimit,
    },
    /// Delete a snapshot, or all snapshots of one cut
    ///
    /// If one snapshot of a cut cannot be deleted, none of them is. The image of a write-mirroring snapshot goes back to its disk as the second leg, and is synchronised by what has
    /// changed since.
    Delete {
        #[arg(value_name = "DISK@NAME", required_unless_present = "group")]
        snapshot: Option<SnapshotRef>,
        /// All snapshots of this cut: the group that each of them shows
        #[arg(long, value_name = "ID", conflicts_with_all = ["snapshot", "keep_image"])]
        group: Option<Uuid>,
        /// Even if a reader is connected
        #[arg(long)]
        force: bool,
        /// Leave its image as an independent raw file; for write-mirroring only
        #[arg(long)]
        keep_image: bool,
        /// Leave a bookmark of its name, so that what has changed since is still known
        #[arg(long)]
        keep_bookmark: bool,
        /// Return only when it is gone; without it, folding or merging may go on
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        limit: WaitLimit,
    },
}

#[derive(Debug, Args)]
pub(super) struct SnapshotCreateArgs {
    /// The name of the snapshot of each disk
    pub(super) name: Name,
    /// A disk to freeze; give it again for more disks
    #[arg(long = "disk", required = true, value_name = "DISK")]
    pub(super) disks: Vec<Name>,
    /// How it is stored [default: the daemon's choice]
    #[arg(long, value_parser = one_of(Strategy::ALL, Strategy::as_str))]
    pub(super) strategy: Option<Strategy>,
    /// How its own blocks lie in its image, or those of its log [default: as is set of the disk]
    #[arg(long, value_parser = one_of(Layout::ALL, Layout::as_str))]
    pub(super) layout: Option<Layout>,
    /// Which writes belong to it: those of requests, or of connections, from before [default: request]
    #[arg(long, value_parser = one_of(Writers::ALL, Writers::as_str))]
    pub(super) writers: Option<Writers>,
    /// Its vhost-user socket; with one disk only [default: <run-dir>/<disk>@<name>.sock]
    #[arg(long, value_name = "PATH")]
    pub(super) socket: Option<PathBuf>,
    /// The image for its own blocks; with one disk only
    #[arg(long, value_name = "PATH")]
    pub(super) image: Option<PathBuf>,
    /// Return only when it is quiesced and its socket is open
    #[arg(long)]
    pub(super) wait: bool,
    #[command(flatten)]
    pub(super) limit: WaitLimit,
}

#[derive(Debug, Subcommand)]
pub(super) enum VolumeCommand {
    /// Make a volume that guests can write, off a snapshot of a disk or of another volume
    ///
    /// What is written to it goes to an image of its own. Neither the snapshot nor its disk changes, and the snapshot cannot
    /// be deleted while the volume is there.
    Create {
        /// Its name; no disk may have the same
        name: Name,
        /// The snapshot; or a disk or volume, of which a snapshot with the volume's name is taken first
        #[arg(long, value_name = "DISK@NAME|DISK|VOLUME")]
        from: VolumeSource,
        /// Its vhost-user socket [default: <run-dir>/<name>.sock]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
        /// The image for what is written to it, where nothing is yet [default: one in the state directory]
        #[arg(long, value_name = "PATH")]
        image: Option<PathBuf>,
        /// The size of the blocks that its tables count in, 4K to 1M [default: that of the disk]
        #[arg(long, value_name = "SIZE", value_parser = block_size)]
        block_size: Option<u32>,
    },
    /// List all volumes
    List {
        /// Only those that stand, or stood, on this snapshot; * stands for any text
        #[arg(long, value_name = "GLOB")]
        from: Option<Glob>,
        /// Only those in this state
        #[arg(long, value_parser = one_of(VolumeState::ALL, VolumeState::as_str))]
        state: Option<VolumeState>,
        #[command(flatten)]
        page: PageArgs<Name>,
    },
    /// Show one volume
    Show {
        /// The volume, or its id
        #[arg(value_name = "NAME|ID")]
        volume: Name,
    },
    /// List what differs between a volume as it was made and a snapshot of it, or its present
    ///
    /// Prints ranges of bytes; all others are equal.
    Diff {
        /// The volume, or its id
        #[arg(value_name = "NAME|ID")]
        volume: Name,
        /// A snapshot or bookmark of the volume [default: the present]
        #[arg(value_name = "NAME@SNAPSHOT|ID")]
        to: Option<MomentArg>,
    },
    /// Print which blocks are the volume's own, and which were written since it was made
    ///
    /// Prints JSON, also without --json: each is a list of runs, the first block and how many.
    Map {
        /// The volume, or its id
        #[arg(value_name = "NAME|ID")]
        volume: Name,
        /// Draw both instead, for people
        #[arg(long)]
        text: bool,
    },
    /// Show how far a volume is from its source, and how much of it is its own
    Status {
        /// The volume, or its id
        #[arg(value_name = "NAME|ID")]
        volume: Name,
    },
    /// Copy what a volume does not own yet (flatten it), until it needs its snapshot no more; goes on if that was stopped
    ///
    /// Guests may use the volume meanwhile. Afterwards its image is a plain raw image, the snapshot and its disk can go, and
    /// 'volume promote' makes it a disk.
    Complete {
        /// The volume
        #[arg(value_name = "NAME")]
        volume: Name,
        #[command(flatten)]
        pace: PaceArgs,
        /// Return only when it is independent
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        limit: WaitLimit,
    },
    /// Bring a volume to the present of its source, dropping what was written to it
    ///
    /// It shows the present at once, off a snapshot that the daemon takes and lets go by itself. A volume that was complete
    /// then copies what differs in the background, and is complete again; stopping that half way harms nothing.
    Update {
        #[arg(value_name = "NAME")]
        volume: Name,
        /// Even if a frontend is connected: the volume's socket is closed, and opened again with the new content
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        pace: PaceArgs,
        /// Return only when what differs is copied
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        limit: WaitLimit,
    },
    /// Change how a volume is served, now and after the next start of the daemon
    ///
    /// Durability counts for the next snapshots, background at once; queues and serial for the next frontend that connects.
    Set {
        /// The volume
        #[arg(value_name = "NAME")]
        volume: Name,
        #[command(flatten)]
        set: SetArgs,
    },
    /// Give a volume another name; its snapshots, bookmarks, volumes, jobs and guests stay with it
    Rename {
        #[arg(value_name = "OLD")]
        volume: Name,
        #[arg(value_name = "NEW")]
        to: Name,
        /// Also while a frontend is connected to a socket that is called after the volume, and moves with its name
        #[arg(long)]
        force: bool,
    },
    /// Make a volume that is complete a disk; its guests stay connected
    Promote {
        /// The volume
        #[arg(value_name = "NAME")]
        volume: Name,
    },
    /// Close a volume's socket until it is enabled, also across restarts; its content is kept
    Disable {
        /// The volume
        #[arg(value_name = "NAME")]
        volume: Name,
        /// Even if a frontend is connected
        #[arg(long)]
        force: bool,
    },
    /// Serve a disabled volume again
    Enable {
        /// The volume
        #[arg(value_name = "NAME")]
        volume: Name,
        /// Drop what was written to it, so that it shows its snapshot again; at once, nothing is copied
        #[arg(long)]
        fresh: bool,
    },
    /// Delete a volume and what was written to it; the snapshot that it stands on stays
    Delete {
        /// The volume
        #[arg(value_name = "NAME")]
        volume: Name,
        /// Even if a frontend is connected or it has snapshots
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum BookmarkCommand {
    /// List all bookmarks
    List {
        /// Only those of this disk or volume; * stands for any text
        #[arg(long, value_name = "GLOB")]
        disk: Option<Glob>,
        /// Only those in this state
        #[arg(long, value_parser = one_of(BookmarkState::ALL, BookmarkState::as_str))]
        state: Option<BookmarkState>,
        #[command(flatten)]
        page: PageArgs<SnapshotRef>,
    },
    /// Show one bookmark
    Show {
        #[arg(value_name = "DISK@NAME|ID")]
        bookmark: MomentArg,
    },
    /// Forget a bookmark; what has changed since older ones is still known
    Delete {
        #[arg(value_name = "DISK@NAME")]
        bookmark: SnapshotRef,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum JobCommand {
    /// List all jobs
    List {
        /// Only those that do this
        #[arg(long, value_parser = one_of(JobKind::ALL, JobKind::as_str))]
        kind: Option<JobKind>,
        /// Only those in this state
        #[arg(long, value_parser = one_of(JobState::ALL, JobState::as_str))]
        state: Option<JobState>,
        /// Only those of this disk or volume; * stands for any text
        #[arg(long, value_name = "GLOB")]
        disk: Option<Glob>,
        #[command(flatten)]
        page: PageArgs<u64>,
    },
    /// Show one job
    Show { id: u64 },
    /// Change the pace of a job
    Set {
        id: u64,
        #[command(flatten)]
        pace: PaceArgs,
    },
    /// Stop a job between two blocks, until it is resumed; what it has done stays done
    ///
    /// It stays stopped across a restart of the daemon. A job that has ended is taken off the list.
    Stop { id: u64 },
    /// Go on with a stopped job
    Resume { id: u64 },
    /// Wait until a job has ended; fails if it fails or is stopped
    Wait {
        id: u64,
        /// Wait no longer than this, and then say how far it is: seconds, or a number with s, m or h
        #[arg(long, value_name = "SECONDS|5m", value_parser = span)]
        wait_timeout: Option<Duration>,
    },
}
