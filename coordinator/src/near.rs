//! Near-duplicates: pictures whose 64-bit perceptual hashes differ in few bits. Pure.
//!
//! By the pigeonhole principle, two hashes that differ in at most d bits are equal in at least one of d + 1 bands of
//! bits (multi-index hashing: Norouzi, Punjani, Fleet, 2012; Manku, Jain, Sarma, 2007). So the hashes are grouped by
//! each band in turn, each group that is still large by bands of the remaining bits once more, and only members of one
//! group are compared.

/// Groups up to this size are compared pair by pair.
const SMALL: usize = 32;

/// In a group that no band takes apart any more, each hash is compared with so many that follow it in numerical order.
/// Only thousands of pictures that differ in their last bits alone come to this.
const WINDOW: usize = 256;

/// The `bands` bands of the bits in `mask`, as masks, their sizes as equal as can be.
pub(crate) fn bands(mask: u64, bands: u32) -> impl Iterator<Item = u64> {
    let bits = mask.count_ones();
    (0..bands).map(move |band| {
        let (from, to) = (bits * band / bands, bits * (band + 1) / bands);
        let (mut place, mut taken) = (0, 0);
        for bit in 0..64 {
            if mask & (1 << bit) != 0 {
                if (from..to).contains(&place) {
                    taken |= 1 << bit;
                }
                place += 1;
            }
        }
        taken
    })
}

/// The lowest eight bits of a hash's band, by which hashes are dealt to partitions: those that are equal in the band
/// meet.
pub(crate) fn partition(hash: u64, band: u64) -> u8 {
    let shifted = (hash & band) >> band.trailing_zeros().min(63);
    // Bands of a whole hash are contiguous.
    shifted as u8
}

/// Calls `pair` with the places of all hashes in `hashes` that are equal in `band` and differ in at most `bits` bits;
/// perhaps more than once. `hashes` must be distinct.
pub(crate) fn pairs(hashes: &[u64], band: u64, bits: u32, pair: &mut impl FnMut(usize, usize)) {
    let mut places: Vec<u32> = (0..hashes.len() as u32).collect();
    group(hashes, &mut places, band, !band, bits, 1, pair);
}

/// Groups by `band`; `free` are the bits in which members may still differ.
fn group(
    hashes: &[u64],
    places: &mut [u32],
    band: u64,
    free: u64,
    bits: u32,
    depth: u32,
    pair: &mut impl FnMut(usize, usize),
) {
    let hash = |place: u32| hashes[place as usize];
    places.sort_unstable_by_key(|&place| (hash(place) & band, hash(place)));
    for group_of in places.chunk_by_mut(|&a, &b| (hash(a) ^ hash(b)) & band == 0) {
        if group_of.len() > SMALL && depth > 0 {
            for band in bands(free, bits + 1) {
                group(hashes, group_of, band, free & !band, bits, depth - 1, pair);
            }
            continue;
        }
        for (i, &a) in group_of.iter().enumerate() {
            for &b in group_of[i + 1..].iter().take(WINDOW) {
                if (hash(a) ^ hash(b)).count_ones() <= bits {
                    pair(a as usize, b as usize);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn found(hashes: &[u64], bits: u32) -> BTreeSet<(usize, usize)> {
        let mut all = BTreeSet::new();
        for band in bands(u64::MAX, bits + 1) {
            pairs(hashes, band, bits, &mut |a, b| {
                all.insert((a.min(b), a.max(b)));
            });
        }
        all
    }

    proptest! {
        /// Hashes around few centres, so that there are groups small and large, and pairs at every distance.
        #[test]
        fn all_pairs_within_the_distance_are_found_and_no_others(
            centres in prop::collection::vec(any::<u64>(), 1..4),
            flips in prop::collection::vec((0usize..4, prop::collection::vec(0u32..64, 0..6)), 2..120),
            bits in 0u32..=6,
        ) {
            let near = |(centre, flips): &(usize, Vec<u32>)| {
                flips.iter().fold(centres[centre % centres.len()], |hash, bit| hash ^ (1 << bit))
            };
            let hashes: Vec<u64> = flips.iter().map(near).collect::<BTreeSet<_>>().into_iter().collect();
            let mut expected = BTreeSet::new();
            for (i, a) in hashes.iter().enumerate() {
                for (j, b) in hashes.iter().enumerate().skip(i + 1) {
                    if (a ^ b).count_ones() <= bits {
                        expected.insert((i, j));
                    }
                }
            }
            prop_assert_eq!(found(&hashes, bits), expected);
        }

        #[test]
        fn hashes_that_are_equal_in_a_band_share_its_partition(a: u64, b: u64, bits in 0u32..=6) {
            for band in bands(u64::MAX, bits + 1) {
                let b = b & !band | a & band;
                prop_assert_eq!(partition(a, band), partition(b, band));
            }
        }
    }

    #[test]
    fn a_hundred_thousand_hashes_that_are_alike_in_most_bits_take_no_quadratic_time() {
        // All pairs would be five thousand million; each hash may meet a window of others in a few groups.
        let hashes: Vec<u64> = (0..100_000u64).map(|i| 0xdead_beef_0000_0000 | i).collect();
        let mut compared = 0u64;
        for band in bands(u64::MAX, 5) {
            pairs(&hashes, band, 4, &mut |_, _| compared += 1);
        }
        assert!(compared > 0 && compared < 100_000 * 25 * WINDOW as u64);
    }
}
