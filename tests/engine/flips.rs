//! Every flipped bit of a write-intent bitmap: found and named, or without any effect.
//!
//! Other tables are in `src/store/durable_tests.rs` and `src/store/flip_tests.rs`, records in `src/store/records_tests.rs`.

use std::sync::Arc;

use halfsilver::engine::{LegImage, LegState, Pair, VersionId};

use crate::bench::Bench;
use crate::sim::{SECTOR, SimImage};

#[test]
fn every_flipped_bit_of_a_write_intent_bitmap_is_found() {
    let (bench, _, second, bitmap) = Bench::mirrored();
    let open = || {
        let leg = |n, image: &SimImage| LegImage { id: VersionId::from_u128(n), image: Arc::new(image.clone()) };
        let legs = [leg(1, &bench.live), leg(2, &second)];
        // On a copy: a pair that is opened may change its bitmap.
        let [of, also] = ["open", "examine"].map(|name| bitmap.copy(name));
        let queue = bench.queue.clone();
        bench.run(async move {
            let examined = Pair::examine(&legs, Arc::new(also), VersionId::nil(), 16384, 4096, &queue).await;
            let pair = Pair::open(&legs, Arc::new(of), VersionId::nil(), 4096, &queue).await;
            let states = |pair: Arc<Pair>| pair.status().into_iter().map(|leg| leg.state).collect::<Vec<_>>();
            (pair.map(|pair| (states(pair.clone()), pair.marked_bytes())).ok(), examined.ok())
        })
    };
    let (good, examined) = open();
    let good = good.unwrap();
    assert_eq!(good, (vec![LegState::InSync, LegState::Resynchronising], 16384));
    assert_eq!(examined.unwrap().regions, 1);
    for bit in 0..bitmap.bytes().len() * 8 {
        bitmap.flip(bit);
        let (opened, examined) = open();
        if bit < SECTOR * 8 {
            assert!(opened.is_none() && examined.is_none(), "bit {bit} of the header went unnoticed");
        } else {
            // The regions of a damaged sector are taken as different, so everything is copied.
            assert_eq!(opened, Some(good.clone()), "bit {bit}");
            assert_eq!(examined.unwrap().damaged.len(), 1, "bit {bit}");
        }
        bitmap.flip(bit);
    }
}
