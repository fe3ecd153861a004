//! What is done to disks, snapshots and volumes: one file a command.
//!
//! What always holds:
//! - A command is decided about and has its claim (`registry`, `manager::claims`) before it changes anything.
//! - What a record is about to name is durable before the record is, and files go after the record that named them.
//! - What fails half way is undone, or is as a kill would leave it, which a start puts in order.
//!
//! What this does not do: to decide whether something may be done; HTTP.

mod accept_disk;
mod add_disk;
mod complete_volume;
mod create_snapshot;
mod create_volume;
mod delete_bookmark;
mod delete_group;
mod delete_snapshot;
mod enable_volume;
mod mirror_disk;
mod remove;
mod rename;
mod resize;
mod restore_disk;
mod set;
mod update_volume;
