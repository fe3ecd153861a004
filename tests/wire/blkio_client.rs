//! blkio: a vhost-user-blk client that somebody else wrote, against a byte array.
