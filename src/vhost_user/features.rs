//! What is offered to frontends: virtio features, vhost-user protocol features, limits and the config space.
//!
//! What always holds: no feature is accepted that was not offered. The limits in the config space are hints: a request that
//! goes beyond them is carried out in parts by [`super::request`]. SIZE_MAX is not among them: FreeBSD does not attach a
//! disk whose segments are short. The config space is the kernel's own struct, so offsets cannot drift.

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::{virtio_blk as blk, virtio_config, virtio_ring};

use crate::engine::Geometry;

/// Bytes of a virtio-blk sector, the unit of all positions (virtio 1.2, 5.2.4), whatever the block size.
pub(super) const SECTOR_BYTES: u64 = 512;
/// Sectors of one write-zeroes segment that are offered: 1 GiB.
pub(super) const RANGE_SECTORS_OFFERED: u32 = (1 << 30) / 512;
/// Segments of one discard or write-zeroes request that are offered.
pub(super) const RANGE_SEGMENTS_OFFERED: u32 = 32;
/// Segments that one discard or write-zeroes request may have.
pub(super) const RANGE_SEGMENTS_MAX: usize = 4096;
/// Entries of a ring, and of an indirect table (virtio 1.2, 2.7).
pub(super) const RING_ENTRIES_MAX: u16 = 32768;
/// Queues of a disk.
pub const QUEUES_MAX: u16 = 16;
/// Memory regions of a frontend; what the kernel's own vhost allows.
pub(super) const MEMORY_SLOTS_MAX: usize = 509;

const fn bit(number: u32) -> u64 {
    1 << number
}

/// A device that has read requests only (virtio 1.2, 5.2.3).
pub(super) const READ_ONLY: u64 = bit(blk::VIRTIO_BLK_F_RO);
/// The driver knows that FLUSH exists, so a write need not be durable when it completes.
pub(super) const FLUSH: u64 = bit(blk::VIRTIO_BLK_F_FLUSH);
/// The driver may switch between writeback and writethrough.
pub(super) const CONFIG_WCE: u64 = bit(blk::VIRTIO_BLK_F_CONFIG_WCE);
/// Discard requests.
pub(super) const DISCARD: u64 = bit(blk::VIRTIO_BLK_F_DISCARD);
/// Write-zeroes requests.
pub(super) const WRITE_ZEROES: u64 = bit(blk::VIRTIO_BLK_F_WRITE_ZEROES);
/// Indirect descriptor tables.
pub(super) const INDIRECT_DESC: u64 = bit(virtio_ring::VIRTIO_RING_F_INDIRECT_DESC);
/// Notifications by index.
pub(super) const EVENT_IDX: u64 = bit(virtio_ring::VIRTIO_RING_F_EVENT_IDX);
/// vhost-user's own: protocol features exist, and rings start disabled.
pub(super) const PROTOCOL_FEATURES: u64 = bit(30);

/// The virtio features of a disk.
pub(super) fn offered(read_only: bool) -> u64 {
    let common = bit(virtio_config::VIRTIO_F_VERSION_1)
        | PROTOCOL_FEATURES
        | EVENT_IDX
        | INDIRECT_DESC
        | FLUSH
        | CONFIG_WCE
        | bit(blk::VIRTIO_BLK_F_SEG_MAX)
        | bit(blk::VIRTIO_BLK_F_BLK_SIZE)
        | bit(blk::VIRTIO_BLK_F_TOPOLOGY)
        | bit(blk::VIRTIO_BLK_F_MQ);
    common | if read_only { READ_ONLY } else { DISCARD | WRITE_ZEROES }
}

/// The vhost-user protocol features.
pub(super) fn protocol_offered() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
}

/// The largest physical sector to show.
const PHYSICAL_BYTES_MAX: u32 = 4096;

/// What a driver is told of requests that suit the disk. A request that goes beyond it is carried out all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hints {
    /// Data segments of one request. A ring without indirect descriptors must have room for two descriptors more.
    pub segments: u16,
    /// What discards are best multiples of, in bytes; shown as at least the size of the tables' blocks.
    pub discard_granularity: u32,
    /// The bytes of one segment of a discard.
    pub discard_max: u64,
}

impl Default for Hints {
    /// What a ring of 128 entries holds; the discards that Windows takes (it finds the device unable to discard when the
    /// granularity is smaller); and 1 GiB at once.
    fn default() -> Hints {
        Hints { segments: 126, discard_granularity: 32 << 10, discard_max: 1 << 30 }
    }
}

/// The config space of one session.
#[derive(Clone)]
pub(super) struct ConfigSpace {
    config: blk::virtio_blk_config,
}

/// The size of the struct in bytes; what lies behind the fields of the offered features reads as zeros.
const CONFIG_BYTES: usize = size_of::<blk::virtio_blk_config>();
/// Where the config space ends that frontends may ask for (vhost-user's own bound); what is behind the struct reads as
/// zeros.
const SPACE_BYTES: usize = 256;
/// Where some frontends take the device's part of the config space to begin: as of a PCI device.
const SPACE_OFFSET: usize = 0x100;
/// Where the one writable byte lies.
pub(super) const WRITEBACK_OFFSET: usize = std::mem::offset_of!(blk::virtio_blk_config, wce);

const _: () = assert!(CONFIG_BYTES == 96 && align_of::<blk::virtio_blk_config>() == 1);
const _: () = assert!(WRITEBACK_OFFSET == 32);
const _: () = assert!(std::mem::offset_of!(blk::virtio_blk_config, max_discard_sectors) == 36);
const _: () = assert!(std::mem::offset_of!(blk::virtio_blk_config, write_zeroes_may_unmap) == 56);

impl ConfigSpace {
    /// The config space of a disk of this geometry with `queues` queues, writeback on. The size of the tables' blocks shows
    /// as what transfers are best aligned to, and not as that of physical sectors, which some systems refuse above 4096.
    pub(super) fn new(geometry: &Geometry, read_only: bool, queues: u16, hints: Hints) -> ConfigSpace {
        let logical = geometry.logical_block_bytes.max(512);
        let per_block = (geometry.block_bytes / logical).max(1);
        let physical = geometry.block_bytes.clamp(logical, PHYSICAL_BYTES_MAX.max(logical));
        let granularity = hints.discard_granularity.max(geometry.block_bytes);
        let mut config = blk::virtio_blk_config {
            capacity: (geometry.size_bytes / SECTOR_BYTES).to_le(),
            seg_max: u32::from(hints.segments).to_le(),
            blk_size: logical.to_le(),
            physical_block_exp: u8::try_from((physical / logical).ilog2()).unwrap_or(0),
            min_io_size: u16::try_from(per_block).unwrap_or(u16::MAX).to_le(),
            opt_io_size: per_block.to_le(),
            wce: 1,
            num_queues: queues.to_le(),
            ..blk::virtio_blk_config::default()
        };
        if !read_only {
            config.max_discard_sectors = u32::try_from(hints.discard_max / SECTOR_BYTES).unwrap_or(u32::MAX).to_le();
            config.max_discard_seg = RANGE_SEGMENTS_OFFERED.to_le();
            config.discard_sector_alignment = (granularity / 512).to_le();
            config.max_write_zeroes_sectors = RANGE_SECTORS_OFFERED.to_le();
            config.max_write_zeroes_seg = RANGE_SEGMENTS_OFFERED.to_le();
            config.write_zeroes_may_unmap = 1;
        }
        ConfigSpace { config }
    }

    /// `size` bytes from `offset` on, or nothing when they leave the config space. Offsets from [`SPACE_OFFSET`] on name the
    /// same bytes as those from 0 on.
    pub(super) fn read(&self, offset: u32, size: u32) -> Option<Vec<u8>> {
        let from = place(offset)?;
        let to = from.checked_add(usize::try_from(size).ok()?).filter(|to| *to <= SPACE_BYTES)?;
        let mut space = [0; SPACE_BYTES];
        space[..CONFIG_BYTES].copy_from_slice(self.as_bytes());
        Some(space[from..to].to_vec())
    }

    /// The size that it says, in bytes.
    pub(super) fn capacity_bytes(&self) -> u64 {
        u64::from_le(self.config.capacity) * SECTOR_BYTES
    }

    /// The disk has this size now.
    pub(super) fn set_capacity(&mut self, bytes: u64) {
        self.config.capacity = (bytes / SECTOR_BYTES).to_le();
    }

    /// Writes the writeback byte. False for any other place or value.
    pub(super) fn write(&mut self, offset: u32, bytes: &[u8]) -> bool {
        match bytes {
            [value @ 0..=1] if place(offset) == Some(WRITEBACK_OFFSET) => {
                self.config.wce = *value;
                true
            }
            _ => false,
        }
    }

    /// Whether the writeback byte says that a write may complete before it is durable.
    pub(super) fn is_writeback(&self) -> bool {
        self.config.wce == 1
    }

    /// As if the driver had written the writeback byte.
    pub(super) fn set_writeback(&mut self, writeback: bool) {
        self.config.wce = u8::from(writeback);
    }

    fn as_bytes(&self) -> &[u8; CONFIG_BYTES] {
        // SAFETY: a packed struct of integers without padding, borrowed for as long as the bytes are.
        unsafe { &*(&raw const self.config).cast::<[u8; CONFIG_BYTES]>() }
    }
}

/// Where an offset of a message points to in the config space.
fn place(offset: u32) -> Option<usize> {
    let offset = usize::try_from(offset).ok()?;
    Some(offset.checked_sub(SPACE_OFFSET).unwrap_or(offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(read_only: bool) -> ConfigSpace {
        let geometry = Geometry { size_bytes: 1 << 20, logical_block_bytes: 512, block_bytes: 4096 };
        ConfigSpace::new(&geometry, read_only, 3, Hints::default())
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let c = space(false).read(0, 60).unwrap();
        assert_eq!(c[0..8], 2048u64.to_le_bytes());
        assert_eq!(c[8..12], [0; 4]);
        assert_eq!(c[12..16], 126u32.to_le_bytes());
        assert_eq!(c[20..24], 512u32.to_le_bytes());
        assert_eq!((c[24], c[32]), (3, 1));
        assert_eq!((&c[26..28], &c[28..32]), (&8u16.to_le_bytes()[..], &8u32.to_le_bytes()[..]));
        assert_eq!(c[34..36], 3u16.to_le_bytes());
        assert_eq!(c[44..48], 64u32.to_le_bytes());
        assert_eq!(space(true).read(36, 21).unwrap(), vec![0; 21]);
    }

    #[test]
    fn large_blocks_are_no_physical_sectors() {
        for (logical, block, exponent) in
            [(512u32, 1u32 << 20, 3u8), (4096, 1 << 20, 0), (4096, 4096, 0), (512, 65536, 3)]
        {
            let geometry = Geometry { size_bytes: 1 << 30, logical_block_bytes: logical, block_bytes: block };
            let hints = Hints { segments: 2, discard_granularity: 4096, discard_max: 64 << 20 };
            let c = ConfigSpace::new(&geometry, false, 1, hints).read(0, 60).unwrap();
            let word = |at: usize| u32::from_le_bytes(c[at..at + 4].try_into().unwrap());
            assert_eq!((word(12), word(20), c[24], word(28)), (2, logical, exponent, block / logical));
            assert_eq!((word(36), word(44)), ((64 << 20) / 512, block / 512));
        }
    }

    #[test]
    fn ranges_are_checked() {
        let mut s = space(false);
        for (offset, size, ok) in
            [(0, 96, true), (0, 256, true), (255, 1, true), (256, 256, true), (250, 10, false), (u32::MAX, 2, false)]
        {
            assert_eq!(s.read(offset, size).is_some(), ok, "{offset}+{size}");
        }
        let whole = s.read(0, 256).unwrap();
        assert_eq!(whole[CONFIG_BYTES..], [0; SPACE_BYTES - CONFIG_BYTES]);
        assert_eq!(s.read(0x100, 60).unwrap(), whole[..60]);
        assert_eq!(s.read(0x100 + 32, 1).unwrap(), [1]);
        for (offset, bytes, ok) in [
            (32, &[0u8][..], true),
            (0x120, &[1], true),
            (32, &[2], false),
            (32, &[0, 0], false),
            (31, &[0], false),
            (32, &[], false),
            (32, &[0], true),
        ] {
            assert_eq!(s.write(offset, bytes), ok, "{offset} {bytes:?}");
        }
        assert!(!s.is_writeback());
    }
}
