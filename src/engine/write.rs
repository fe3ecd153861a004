//! Writes and write-zeroes (source 002 [0095], [0097], [00107], [00108]; figures 23, 25 and 27).
//!
//! A write is carried out in parts of bounded size. For each part: take the block locks (2702), look at the chain and
//! its tables (2703), save what an older version reads (2707, 2708), write to every version that must
//! see it (2705, 2709), release (2710). Data that goes to two places is copied once, so that a guest that
//! changes its buffer meanwhile cannot make the places differ.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::geometry::usize_of;
use super::place::Unheld;
use super::plan::BlockPlan;
use super::restoring::Restore;
use super::{
    Backing, Chain, Copy, Disk, Epoch, Fill, Harmed, Mode, RequestError, RestoreSource, Run, Ticket, VersionIn,
    VersionIndex, WritePlan,
};
use crate::image::{
    AlignedBuf, Alignment, ByteOffset, GuestBuf, ImageError, ImageErrorKind, ImageOp, IoBuf, IoQueue, Share, join_all,
};
use crate::store::BlockRange;

/// Containers zero whole units of this size themselves; the rest is written, because zeroing a part of a unit may
/// rewrite the neighbours in it.
const ZERO_UNIT_BYTES: u64 = 4096;

/// Memory that lies at multiples of this, in multiples of this, suits every container.
const UNIT_MAX: u32 = 4096;

/// What to write.
#[derive(Debug)]
pub(super) enum Data {
    /// The guest's memory.
    Guest(GuestBuf),
    /// Zeros.
    Zeros { len: u64, unmap: bool },
}

impl Data {
    fn len(&self) -> u64 {
        match self {
            Data::Guest(guest) => guest.len() as u64,
            Data::Zeros { len, .. } => *len,
        }
    }

    /// All of it; nothing is left.
    fn take(&mut self) -> Data {
        std::mem::replace(self, Data::Zeros { len: 0, unmap: false })
    }

    fn part(&self, from: u64, len: u64) -> Data {
        match self {
            Data::Guest(guest) => Data::Guest(guest.slice(usize_of(from)..usize_of(from + len))),
            Data::Zeros { unmap, .. } => Data::Zeros { len, unmap: *unmap },
        }
    }
}

/// One part of a write: where, and which blocks it touches.
#[derive(Clone, Copy)]
struct Part {
    at: ByteOffset,
    len: u64,
    blocks: BlockRange,
    durable: bool,
}

/// The data of a part that goes to several places, or to a place where the edges must be filled.
enum Stable {
    Bytes(Arc<AlignedBuf>),
    Zeros { unmap: bool },
}

impl Disk {
    pub(super) async fn write(
        &self,
        queue: &IoQueue,
        ticket: &Ticket,
        at: ByteOffset,
        mut data: Data,
        durable: bool,
    ) -> Result<(), RequestError> {
        let geometry = self.geometry();
        let part_bytes = geometry.blocks_per_part() * u64::from(geometry.block_bytes);
        let (mut done, len) = (0, data.len());
        while done < len {
            let here = at.add(done);
            let part_len = (part_bytes - here.0 % u64::from(geometry.block_bytes)).min(len - done);
            let part = Part { at: here, len: part_len, blocks: geometry.covering(here, part_len), durable };
            let of_part = if part_len == len { data.take() } else { data.part(done, part_len) };
            self.write_part(queue, ticket.epoch(), part, of_part).await?;
            done += part_len;
        }
        Ok(())
    }

    async fn write_part(&self, queue: &IoQueue, epoch: Epoch, part: Part, data: Data) -> Result<(), RequestError> {
        match data {
            // Before the locks: whoever has them goes on without waiting for memory.
            Data::Guest(guest) if must_be_copied(&self.chain.load(), &guest) => {
                let share = queue.copies().take(part.len + self.copied_by(&part)).await;
                let copy = GuestBuf::from_owned(guest.copy_out()).0;
                self.write_steady(queue, epoch, part, Data::Guest(copy), Some(share)).await
            }
            data => self.write_steady(queue, epoch, part, data, None).await,
        }
    }

    async fn write_steady(
        &self,
        queue: &IoQueue,
        epoch: Epoch,
        part: Part,
        data: Data,
        share: Option<Share>,
    ) -> Result<(), RequestError> {
        if is_plain(&self.chain.load(), &part) {
            let _guard = self.locks.acquire(part.blocks, Mode::Shared).await;
            // Again, now that nobody can copy these blocks.
            let chain = self.chain();
            if is_plain(&chain, &part) {
                self.forget_discards(part.blocks);
                chain.at(0).note(part.blocks);
                return self.write_in_place(queue, chain.at(0), part, data).await;
            }
        }
        // Boxed, so that writes without all this do not carry the room for it.
        Box::pin(self.write_by_plan(queue, epoch, part, data, share)).await
    }

    /// What is written now is wanted.
    fn forget_discards(&self, blocks: BlockRange) {
        if self.discards.count() > 0 {
            self.discards.clear(blocks);
        }
    }

    /// With a share, the memory that this takes is counted already.
    async fn write_by_plan(
        &self,
        queue: &IoQueue,
        epoch: Epoch,
        part: Part,
        data: Data,
        mut share: Option<Share>,
    ) -> Result<(), RequestError> {
        let geometry = self.geometry();
        let is_whole = |block| {
            let (at, len) = geometry.bytes(BlockRange::one(block));
            part.at <= at && at.0 + len <= part.at.0 + part.len
        };
        let decide = |chain: &Chain| WritePlan::decide(chain.at(chain.at_epoch(epoch)), part.blocks, is_whole);
        let excludes = |chain: &Chain, plan: &BlockPlan| {
            let is_alone = |target| {
                let image = &chain.layer(target).image;
                image.excludes() || !image.takes(part.at, part.len)
            };
            plan.excludes() || plan.targets().any(is_alone)
        };
        // A guess, which looks at no more blocks than it needs.
        let mut mode = {
            let chain = self.chain.load();
            let writer = chain.at(chain.at_epoch(epoch));
            let mut plans = part.blocks.iter().map(|block| BlockPlan::decide(writer, block, is_whole(block)));
            if plans.any(|plan| excludes(&chain, &plan)) { Mode::Exclusive } else { Mode::Shared }
        };
        let mut will_copy = mode == Mode::Exclusive;
        let is_copy = share.is_some();
        loop {
            if will_copy && share.is_none() {
                share = Some(queue.copies().take(self.copied_by(&part)).await);
            }
            let guard = self.locks.acquire(part.blocks, mode).await;
            // Only now: whoever held these locks before may have copied blocks for versions that are new to us.
            let chain = self.chain();
            if let Some(gate) = chain.restore().gate() {
                drop(guard);
                // Reads go on meanwhile, and may need it.
                share = share.filter(|_| is_copy);
                gate.opened().await;
                continue;
            }
            if let Restore::Lost(reason) = chain.restore() {
                return Err(RequestError::Broken(reason.clone()));
            }
            let plan = decide(&chain);
            let is_alone = plan.runs.iter().any(|run| excludes(&chain, &run.plan));
            let is_copied = |to| matches!(data, Data::Guest(_)) && chain.layer(to).image.copies();
            will_copy |= is_alone || plan.single_target().is_none_or(is_copied);
            if is_alone && guard.mode() == Mode::Shared {
                mode = Mode::Exclusive;
                drop(guard);
                continue;
            }
            if will_copy && share.is_none() {
                drop(guard);
                continue;
            }
            return self.write_planned(queue, &chain, plan, || decide(&chain), part, data).await;
        }
    }

    /// The memory that a part may take while it is carried out: a copy of its bytes, what is saved of its blocks, and what
    /// fills them.
    fn copied_by(&self, part: &Part) -> u64 {
        3 * part.blocks.count() * u64::from(self.geometry().block_bytes)
    }

    /// Carries out a plan that was decided under the part's locks; `again` decides it anew when a version was given up.
    async fn write_planned(
        &self,
        queue: &IoQueue,
        chain: &Chain,
        mut plan: WritePlan,
        again: impl Fn() -> WritePlan,
        part: Part,
        data: Data,
    ) -> Result<(), RequestError> {
        while let Err((lost, reason)) = self.preserve(queue, chain, &plan).await {
            self.give_up(chain.at(lost), &reason)?;
            plan = again();
        }
        self.forget_discards(part.blocks);
        note(chain, &plan, part);
        self.carry_out(queue, chain, &plan, part, data).await
    }

    /// Writes whole blocks of the live version, of which the caller holds the locks exclusively. Blocks of zeros take no
    /// room.
    pub(super) async fn write_blocks(
        &self,
        queue: &IoQueue,
        chain: &Chain,
        blocks: BlockRange,
        bytes: AlignedBuf,
    ) -> Result<(), RequestError> {
        let pieces = pieces(&bytes, self.geometry().block_bytes as usize);
        let (at, bytes) = (self.geometry().bytes(blocks).0, GuestBuf::from_owned(bytes).0);
        let writes = pieces.into_iter().map(|(piece, is_zero)| {
            let (at, len) = (at.add(piece.start as u64), piece.len() as u64);
            let data = match is_zero {
                true => Data::Zeros { len, unmap: true },
                false => Data::Guest(bytes.slice(piece)),
            };
            let part = Part { at, len, blocks: self.geometry().covering(at, len), durable: false };
            async move {
                let decide = || WritePlan::decide(chain.at(chain.live()), part.blocks, |_| true);
                self.write_planned(queue, chain, decide(), decide, part, data).await
            }
        });
        join_all(writes).await.into_iter().collect()
    }

    /// Saves the old bytes that older versions read. On failure says which version cannot be kept, and why.
    async fn preserve(&self, queue: &IoQueue, chain: &Chain, plan: &WritePlan) -> Result<(), (VersionIndex, String)> {
        let copies = plan.runs.iter().filter_map(|run| {
            let copy = run.plan.preserve?;
            Some(async move { self.copy_blocks(queue, chain, run.blocks, copy).await.map_err(|e| (copy.to, e)) })
        });
        let copied: SmallVec<[Unheld<'_>; 1]> = join_all(copies).await.into_iter().collect::<Result<_, _>>()?;
        copied.into_iter().for_each(Unheld::enter);
        let mut saved: SmallVec<[VersionIndex; 4]> =
            plan.runs.iter().filter_map(|run| Some(run.plan.preserve?.to)).collect();
        saved.sort_unstable();
        saved.dedup();
        for to in saved {
            if let Err(e) = self.commit_saved(queue, chain.at(to)).await {
                // Those that read through it must not count on what no power cut would leave.
                take_back(chain.at(to), plan);
                return Err((to, e));
            }
        }
        Ok(())
    }

    /// Copies blocks from one layer into another, whose entries are to follow. Zeros take no room. The caller holds the
    /// blocks' locks exclusively.
    pub(super) async fn copy_blocks<'a>(
        &self,
        queue: &IoQueue,
        chain: &'a Chain,
        blocks: BlockRange,
        copy: Copy,
    ) -> Result<Unheld<'a>, String> {
        let (from, to) = (&chain.layer(copy.from).image, chain.at(copy.to));
        // As far as both reach: of a version that is smaller, nothing behind its end is asked for.
        let ((at, has), (_, room)) = (self.bytes_in(from, blocks), self.bytes_in(&to.layer().image, blocks));
        let len = has.min(room);
        if let Some(table) = to.layer().table() {
            table.prepare(blocks).map_err(|e| format!("its table cannot grow: {e}"))?;
        }
        let old = AlignedBuf::scratch(usize_of(len));
        let old = from.read(queue, at, IoBuf::Owned(old)).await.map_err(|e| e.to_string())?;
        let IoBuf::Owned(old) = old else { unreachable!("a transfer gives back the buffer it was given") };
        let old = Arc::new(old);
        let unheld = to.unheld(blocks);
        let pieces = pieces(&old, self.geometry().block_bytes as usize);
        let copied: usize = pieces.iter().filter(|(_, is_zero)| !is_zero).map(|(piece, _)| piece.len()).sum();
        let writes = pieces.into_iter().map(|(piece, is_zero)| {
            let (here, old) = (at.add(piece.start as u64), old.clone());
            async move {
                match is_zero {
                    false => to.layer().image.write(queue, here, IoBuf::Shared(old, piece), false).await,
                    true => to.put_zeros(queue, here, piece.len() as u64).await,
                }
            }
        });
        for done in join_all(writes).await {
            done.map_err(|e| e.to_string())?;
        }
        if let Ok(old) = Arc::try_unwrap(old) {
            old.recycle();
        }
        let version = to.version();
        version.preserved_blocks.fetch_add(blocks.count(), std::sync::atomic::Ordering::Relaxed);
        version.preserved_bytes.fetch_add(copied as u64, std::sync::atomic::Ordering::Relaxed);
        Ok(unheld)
    }

    async fn carry_out(
        &self,
        queue: &IoQueue,
        chain: &Chain,
        plan: &WritePlan,
        part: Part,
        data: Data,
    ) -> Result<(), RequestError> {
        for run in plan.runs.iter().filter(|run| run.plan.adopts) {
            if let Some(table) = chain.layer(run.plan.home).table() {
                let image = &chain.layer(run.plan.home).image;
                let at = self.geometry().bytes(run.blocks).0;
                let full = |e| ImageError::from_io(ImageOp::Write, image.path(), Some(at), &e);
                table.prepare(run.blocks).map_err(full)?;
            }
        }
        // Durable bytes are worth nothing without the entry that points to them, which may be an earlier write's.
        let stores = part.durable && (self.has_logs(chain) || chain.restoring().is_some());
        match plan.single_target() {
            Some(target) if chain.layer(target).image.takes(part.at, part.len) => {
                // What is stored with its entry need not be stored before that.
                let part = Part { durable: part.durable && !stores, ..part };
                self.write_in_place(queue, chain.at(target), part, data).await?;
            }
            _ => self.write_everywhere(queue, chain, plan, part, data).await?,
        }
        self.settle_entries(queue, chain, plan).await;
        settle_restored(chain, plan);
        if stores {
            self.flush_from(queue, chain.at(plan.writer)).await?;
        }
        Ok(())
    }

    /// Writes the part's bytes to one layer as they are.
    async fn write_in_place(
        &self,
        queue: &IoQueue,
        target: VersionIn<'_>,
        part: Part,
        data: Data,
    ) -> Result<(), RequestError> {
        let image = &target.layer().image;
        match data {
            // A layer that came since this was looked at. Nobody waits for memory under a lock.
            Data::Guest(guest) if !fits(image, &guest) => {
                image.write(queue, part.at, IoBuf::Owned(guest.copy_out()), part.durable).await?;
            }
            Data::Guest(guest) => image.write(queue, part.at, IoBuf::Guest(guest), part.durable).await?,
            Data::Zeros { unmap, .. } => {
                Box::pin(write_zeros(image, queue, part.at, part.len, unmap)).await?;
                if part.durable {
                    image.sync(queue).await?;
                }
            }
        }
        Ok(())
    }

    /// The bytes are there: entries follow, and those that they supersede go.
    async fn settle_entries(&self, queue: &IoQueue, chain: &Chain, plan: &WritePlan) {
        for run in &plan.runs {
            if run.plan.adopts {
                chain.at(run.plan.home).enter(run.blocks);
            }
            for &index in &run.plan.supersedes {
                self.drop_entries(queue, chain.at(index), run.blocks).await;
            }
        }
    }

    /// Writes to all targets of each run. A guest that changes its memory meanwhile cannot make them differ.
    async fn write_everywhere(
        &self,
        queue: &IoQueue,
        chain: &Chain,
        plan: &WritePlan,
        part: Part,
        data: Data,
    ) -> Result<(), RequestError> {
        let stable = &match data {
            Data::Guest(guest) => Stable::Bytes(Arc::new(guest.copy_out())),
            Data::Zeros { unmap, .. } => Stable::Zeros { unmap },
        };
        let targets = plan.runs.iter().flat_map(|run| run.plan.targets().map(move |target| (run, target)));
        let writes = targets.map(|(run, target)| async move {
            (run, target, self.write_run(queue, run, chain.at(target), part, stable).await)
        });
        for (run, target, done) in join_all(writes).await {
            let Err(e) = done else { continue };
            match run.harmed_at(chain.at(plan.writer), target) {
                Harmed::Guest => return Err(e.into()),
                Harmed::Frozen(lost) => {
                    lost.into_iter().for_each(|i| self.break_version(chain.version(i), &e.to_string()))
                }
            }
        }
        Ok(())
    }

    /// Writes the part's bytes of one run to one target; a block that home does not have is written whole.
    async fn write_run(
        &self,
        queue: &IoQueue,
        run: &Run,
        target: VersionIn<'_>,
        part: Part,
        stable: &Stable,
    ) -> Result<(), ImageError> {
        let (chain, image) = (target.chain, &target.layer().image);
        let (run_at, run_len) = self.geometry().bytes(run.blocks);
        let from = run_at.max(part.at);
        let to = (run_at.0 + run_len).min(part.at.0 + part.len);
        if let Some(source) = run.plan.fill_from.filter(|_| target.index == run.plan.home) {
            let source = match (source, chain.restoring().map(|restoring| restoring.source())) {
                (Fill::Layer(index), _) => chain.layer(index).image.clone(),
                (Fill::Restored, Some(RestoreSource::View(view))) => Backing::View(view.clone()),
                (Fill::Restored, _) => {
                    let why = "the snapshot that is restored is gone";
                    return Err(ImageError::new(ImageErrorKind::Io, ImageOp::Read, image.path(), why));
                }
            };
            return overlay(&source, image, queue, (run_at, run_len), (from, to), part, stable).await;
        }
        let unit = u64::from(image.alignment().offset_bytes);
        if !from.0.is_multiple_of(unit) || !to.is_multiple_of(unit) {
            let (cover_at, cover_to) = (from.0 / unit * unit, to.next_multiple_of(unit));
            let cover = (ByteOffset(cover_at), cover_to - cover_at);
            return overlay(image, image, queue, cover, (from, to), part, stable).await;
        }
        match stable {
            Stable::Bytes(bytes) => {
                let range = usize_of(from.0 - part.at.0)..usize_of(to - part.at.0);
                image.write(queue, from, IoBuf::Shared(bytes.clone(), range), part.durable).await
            }
            Stable::Zeros { unmap } => {
                write_zeros(image, queue, from, to - from.0, *unmap).await?;
                if part.durable { image.sync(queue).await } else { Ok(()) }
            }
        }
    }
}

/// Notes what the part changes, for its own version. A write that goes to several places may reach some of them only, by a kill
/// or an error: then newer versions differ too.
fn note(chain: &Chain, plan: &WritePlan, part: Part) {
    chain.at(plan.writer).note(part.blocks);
    let is_split = |run: &&Run| !run.plan.others.is_empty() || !run.plan.supersedes.is_empty();
    for run in plan.runs.iter().filter(is_split) {
        (plan.writer + 1..=chain.live()).for_each(|newer| chain.at(newer).note(run.blocks));
    }
}

/// Whether some layer cannot take the guest's memory as it lies.
fn must_be_copied(chain: &Chain, guest: &GuestBuf) -> bool {
    !guest.is_aligned(UNIT_MAX, UNIT_MAX) && !chain.links().iter().all(|link| fits(&link.layer.image, guest))
}

fn fits(image: &Backing, guest: &GuestBuf) -> bool {
    let Alignment { memory_bytes, offset_bytes } = image.alignment();
    guest.is_aligned(memory_bytes, offset_bytes)
}

/// Whether there is nothing but one image that takes the part as it is: the common case.
fn is_plain(chain: &Chain, part: &Part) -> bool {
    let image = &chain.layer(0).image;
    chain.live() == 0 && matches!(chain.restore(), Restore::None) && !image.excludes() && image.takes(part.at, part.len)
}

/// Reads `cover` from `source`, puts the part's bytes of `range` over it, and writes it to `image`.
async fn overlay(
    source: &Backing,
    image: &Backing,
    queue: &IoQueue,
    cover: (ByteOffset, u64),
    range: (ByteOffset, u64),
    part: Part,
    stable: &Stable,
) -> Result<(), ImageError> {
    let whole = IoBuf::Owned(AlignedBuf::zeroed(usize_of(cover.1)));
    let IoBuf::Owned(mut whole) = source.read(queue, cover.0, whole).await? else {
        unreachable!("a transfer gives back the buffer it was given")
    };
    let place = usize_of(range.0.0 - cover.0.0)..usize_of(range.1 - cover.0.0);
    match stable {
        Stable::Bytes(bytes) => {
            let from = usize_of(range.0.0 - part.at.0);
            whole[place.clone()].copy_from_slice(&bytes[from..from + place.len()]);
        }
        Stable::Zeros { .. } => whole[place].fill(0),
    }
    image.write(queue, cover.0, IoBuf::Owned(whole), part.durable).await
}

/// Zeroes a range: whole units by the container, the edges by writing.
async fn write_zeros(
    image: &Backing,
    queue: &IoQueue,
    at: ByteOffset,
    len: u64,
    unmap: bool,
) -> Result<(), ImageError> {
    let end = at.0 + len;
    if matches!(image, Backing::Packed(_)) {
        // Whole blocks, of which it writes none.
        return image.zero(queue, at, len, unmap).await;
    }
    let (first, last) = (at.0.next_multiple_of(ZERO_UNIT_BYTES), end / ZERO_UNIT_BYTES * ZERO_UNIT_BYTES);
    let edge = |from: u64, to: u64| {
        let zeros = AlignedBuf::zeroed(usize_of(to - from));
        image.write(queue, ByteOffset(from), IoBuf::Owned(zeros), false)
    };
    if first >= last {
        return edge(at.0, end).await;
    }
    if at.0 < first {
        edge(at.0, first).await?;
    }
    image.zero(queue, ByteOffset(first), last - first, unmap).await?;
    if last < end {
        edge(last, end).await?;
    }
    Ok(())
}

/// The blocks have their bytes: from now on the live version shows them, and not what it is restored to.
fn settle_restored(chain: &Chain, plan: &WritePlan) {
    let Some(restoring) = chain.restoring() else { return };
    for run in plan.runs.iter().filter(|run| run.plan.settles) {
        restoring.pending().table().clear(run.blocks);
    }
}

fn take_back(to: VersionIn<'_>, plan: &WritePlan) {
    let of_it = |run: &&Run| run.plan.preserve.is_some_and(|copy| copy.to == to.index);
    for run in plan.runs.iter().filter(of_it) {
        to.take_back(run.blocks);
    }
}

/// The pieces of `bytes` that are all zeros or not, in whole blocks, neighbours joined.
fn pieces(bytes: &[u8], block_bytes: usize) -> SmallVec<[(Range<usize>, bool); 1]> {
    let mut pieces: SmallVec<[(Range<usize>, bool); 1]> = SmallVec::new();
    for start in (0..bytes.len()).step_by(block_bytes) {
        let end = (start + block_bytes).min(bytes.len());
        let is_zero = is_zero(&bytes[start..end]);
        match pieces.last_mut() {
            Some((last, same)) if *same == is_zero => last.end = end,
            _ => pieces.push((start..end, is_zero)),
        }
    }
    pieces
}

fn is_zero(bytes: &[u8]) -> bool {
    // SAFETY: every bit pattern is a valid u128.
    let (head, body, tail) = unsafe { bytes.align_to::<u128>() };
    head.iter().chain(tail).all(|&b| b == 0) && body.iter().all(|&w| w == 0)
}
