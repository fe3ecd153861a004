//! What changed, for people and for scripts: differences, maps and states of volumes, bookmarks.
//!
//! Long lists are shown as they come, a line at a time, and never held whole.

use serde::Deserialize;
use serde_json::json;

use super::CliError;
use super::args::{BookmarkCommand, MomentArg, PageArgs};
use super::client::{Client, query_value};
use super::lists;
use super::output::{Output, fields, size, table, text, write};
use crate::control::api::{Bookmark, BookmarkList, ByteRange, VolumeStatus};
use crate::control::changes::DIFF_SOURCE;

/// How many cells a line of a map has.
const MAP_WIDTH: u64 = 64;
/// How many lines a map has at most.
const MAP_LINES_MAX: u64 = 32;

/// A line of a list without what makes it one.
fn item(line: &str) -> &str {
    line.trim().trim_start_matches(',').trim_end_matches(',')
}

fn not_understood(line: &str) -> CliError {
    let line = text(Some(line));
    CliError::Failed(format!("the daemon's answer is not understood ({line:?}); use the halfsilver of its version"))
}

/// Shows what differs; `path` is the resource that is asked.
pub(super) fn diff(path: &str, to: Option<&MomentArg>, client: &Client, output: &Output) -> Result<(), CliError> {
    let query = to.map_or_else(String::new, |to| format!("?to={}", query_value(&to.to_string())));
    let path = format!("{path}/diff{query}");
    if output.json {
        return client.lines(&path, None, |line| Ok(write(format!("{line}\n").as_bytes())?)).map(drop);
    }
    let (mut ranges, mut bytes) = (0_u64, 0_u64);
    let source = client.lines(&path, Some(DIFF_SOURCE), |line| {
        let item = item(line);
        if matches!(item, "[" | "]" | "[]" | "") {
            return Ok(());
        }
        let ByteRange { offset, length } = serde_json::from_str(item).map_err(|_| not_understood(line))?;
        (ranges, bytes) = (ranges + 1, bytes + length);
        Ok(write(format!("{offset:>15} {length:>12}\n").as_bytes())?)
    })?;
    let by = match source.as_deref() {
        Some("owned-tables") => "; it is not known what was written, so this is what is stored in different places",
        _ => "",
    };
    let unit = if ranges == 1 { "range" } else { "ranges" };
    Ok(write(format!("{ranges} {unit}, {} that may differ{by}\n", size(bytes)).as_bytes())?)
}

/// What stands before the lists of a map.
#[derive(Deserialize)]
struct Head {
    name: String,
    block_size: u32,
    blocks: u64,
    reason: Option<String>,
}

/// How many blocks of each cell are in a list.
struct Grid {
    cells: Vec<u64>,
    per_cell: u64,
    blocks: u64,
}

impl Grid {
    fn new(blocks: u64) -> Grid {
        let per_cell = blocks.div_ceil(MAP_WIDTH * MAP_LINES_MAX).max(1);
        let cells = usize::try_from(blocks.div_ceil(per_cell)).unwrap_or(0);
        Grid { cells: vec![0; cells], per_cell, blocks }
    }

    fn add(&mut self, first: u64, count: u64) {
        let end = first.saturating_add(count).min(self.blocks);
        let mut at = first;
        while at < end {
            let cell = at / self.per_cell;
            let until = end.min((cell + 1) * self.per_cell);
            if let Some(cell) = usize::try_from(cell).ok().and_then(|cell| self.cells.get_mut(cell)) {
                *cell += until - at;
            }
            at = until;
        }
    }

    fn room(&self, cell: u64) -> u64 {
        self.per_cell.min(self.blocks - cell * self.per_cell)
    }

    fn draw(&self, title: &str) -> String {
        let total: u64 = self.cells.iter().sum();
        let percent = VolumeStatus::percent(total, self.blocks);
        let mut page = format!("{title}: {total} of {} blocks, {percent:.2} %\n", self.blocks);
        let mut line = String::new();
        for (cell, &count) in (0_u64..).zip(&self.cells) {
            line.push(match (count, self.room(cell)) {
                (0, _) => '.',
                (count, room) if count >= room => '#',
                (count, room) if count * 2 >= room => '+',
                _ => '-',
            });
            if (cell + 1).is_multiple_of(MAP_WIDTH) {
                page.push_str(&format!("  {line}\n"));
                line.clear();
            }
        }
        if !line.is_empty() {
            page.push_str(&format!("  {line}\n"));
        }
        page
    }
}

/// Shows a volume's map: as it comes, or drawn.
pub(super) fn map(volume: &str, draws: bool, client: &Client) -> Result<(), CliError> {
    let path = format!("/v1/volumes/{volume}/map");
    if !draws {
        return client.lines(&path, None, |line| Ok(write(format!("{line}\n").as_bytes())?)).map(drop);
    }
    let mut head: Option<Head> = None;
    let mut grids: Vec<Grid> = Vec::new();
    let mut is_unknown = false;
    client.lines(&path, None, |line| {
        let Some(Head { blocks, .. }) = &head else {
            let whole = format!("{}}}", line.trim_end_matches(','));
            head = Some(serde_json::from_str(&whole).map_err(|_| not_understood(line))?);
            return Ok(());
        };
        if line.starts_with("\"owned\"") || line.starts_with("\"changed\"") {
            is_unknown = line.starts_with("\"changed\":null");
            grids.push(Grid::new(*blocks));
        } else if let Some((first, count)) = run(item(line)) {
            grids.last_mut().ok_or_else(|| not_understood(line))?.add(first, count);
        }
        Ok(())
    })?;
    let (Some(head), [owned, changed]) = (head, &grids[..]) else { return Err(not_understood("a map without lists")) };
    let mut page = owned.draw(&format!("{}: owned", text(Some(&head.name))));
    page.push('\n');
    match is_unknown {
        true => page.push_str(&format!("changed: not known: {}\n", text(head.reason.as_ref()))),
        false => page.push_str(&changed.draw("changed")),
    }
    let cell = size(owned.per_cell.saturating_mul(u64::from(head.block_size)));
    page.push_str(&format!("\neach cell is {cell}: . none, - less than half, + half or more, # all of its blocks\n"));
    Ok(write(page.as_bytes())?)
}

fn run(item: &str) -> Option<(u64, u64)> {
    serde_json::from_str(item).ok()
}

pub(super) fn volume_status_fields(status: &VolumeStatus) -> String {
    let blocks = |count: Option<u64>| count.map_or_else(|| "not known".to_owned(), |count| count.to_string());
    let percent = |percent: Option<f64>| percent.map_or_else(|| "not known".to_owned(), |p| format!("{p:.2} %"));
    fields(&[
        ("volume", status.name.to_string()),
        ("id", status.id.to_string()),
        ("from", text(Some(&status.from))),
        ("differs", format!("{} from {} as it is now", percent(status.percent_differing), text(Some(&status.source)))),
        ("complete", percent(Some(status.percent_complete))),
        ("block size", size(status.block_size.into())),
        ("blocks", status.blocks.to_string()),
        ("owned", status.owned_blocks.to_string()),
        ("changed", blocks(status.changed_blocks)),
        ("source changed", blocks(status.source_changed_blocks)),
        ("differing", blocks(status.differing_blocks)),
        ("reason", text(status.reason.as_ref())),
    ])
}

pub(super) fn bookmark(command: BookmarkCommand, client: &Client, output: &Output) -> Result<(), CliError> {
    match command {
        BookmarkCommand::List { disk, state, page: PageArgs { limit, after } } => {
            let query = BookmarkList { disk, state, limit, after: after.map(|after| after.to_string()) };
            lists::show("/v1/bookmarks", &query, client, output, bookmark_table)
        }
        BookmarkCommand::Show { bookmark } => {
            let bookmark: Bookmark = client.get(&format!("/v1/bookmarks/{bookmark}"))?;
            output.show(&bookmark, bookmark_fields)
        }
        BookmarkCommand::Delete { bookmark } => {
            client.delete(&format!("/v1/bookmarks/{bookmark}"))?;
            let deleted = json!({ "disk": bookmark.disk, "name": bookmark.name, "state": "deleted" });
            output.show(&deleted, |_| format!("{bookmark} deleted\n"))
        }
    }
}

fn bookmark_table(bookmarks: &[Bookmark]) -> String {
    let row = |b: &Bookmark| {
        let (name, state, epoch) = (b.reference().to_string(), b.state.to_string(), b.epoch.to_string());
        [name, state, epoch, b.created_at.to_string(), text(b.reason.as_ref())]
    };
    table(["BOOKMARK", "STATE", "EPOCH", "CREATED", "REASON"], bookmarks.iter().map(row).collect())
}

fn bookmark_fields(bookmark: &Bookmark) -> String {
    fields(&[
        ("bookmark", bookmark.reference().to_string()),
        ("id", bookmark.id.to_string()),
        ("group", bookmark.group.to_string()),
        ("state", bookmark.state.to_string()),
        ("reason", text(bookmark.reason.as_ref())),
        ("epoch", bookmark.epoch.to_string()),
        ("size", size(bookmark.size_bytes)),
        ("block size", size(bookmark.block_size.into())),
        ("created", bookmark.created_at.to_string()),
        ("quiesced", bookmark.quiesced_at.map_or_else(|| "-".to_owned(), |at| at.to_string())),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_counts_each_block_once_and_its_last_cell_may_be_short() {
        let mut grid = Grid::new(64 * 32 * 3 + 1);
        assert_eq!(grid.per_cell, 4);
        grid.add(0, 4);
        grid.add(4, 2);
        grid.add(9, 1);
        grid.add(64 * 32 * 3, 1);
        let drawn = grid.draw("owned");
        assert!(drawn.starts_with("owned: 8 of 6145 blocks, 0.13 %\n  #+-."), "{drawn}");
        assert!(drawn.ends_with(".\n  #\n"), "{drawn}");
    }

    #[test]
    fn a_small_volume_has_a_cell_for_each_block() {
        let mut grid = Grid::new(3);
        grid.add(1, 2);
        assert_eq!(grid.draw("changed"), "changed: 2 of 3 blocks, 66.67 %\n  .##\n");
    }
}
