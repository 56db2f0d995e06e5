use super::*;
use proto::Split;

/// Finds in samples of (content, label, split, perceptual hash); each one's key is its place in the list.
fn find(
    rules: Duplicates,
    per_class: u32,
    samples: &[(u8, u32, Split, Option<u64>)],
) -> Vec<(i64, String, Option<i64>)> {
    found(&DatasetSpec { duplicates: rules, per_class, ..DatasetSpec::default() }, samples)
}

fn found(spec: &DatasetSpec, samples: &[(u8, u32, Split, Option<u64>)]) -> Vec<(i64, String, Option<i64>)> {
    let mut finder = Finder::new(spec, None);
    for (key, &(content, label, split, hash)) in (0u64..).zip(samples) {
        let of = GistSample {
            split,
            several_classes: false,
            sha256: Some([content; 32]),
            phash: hash,
            block: 0,
            moments: proto::shard::Moments::default(),
        };
        let sample = SampleId { key, shard: (key % 3) as u32, ordinal: (key / 3) as u32 };
        finder.push(sample, label, &of, true).expect("in memory").expect("a whole one");
    }
    let found = finder.find().expect("in memory");
    let mut all = Vec::new();
    for partition in found.by_shard {
        for (shard, of_shard) in partition.expect("in memory") {
            for finding in of_shard {
                let skipped = found.skips.get(&shard).is_some_and(|skips| skips.contains(finding.sample.ordinal));
                assert_eq!(finding.skip().is_some(), skipped);
                let row = finding.row();
                all.push((row.key, row.skipped.unwrap_or_else(|| "looks like".to_owned()), row.like));
            }
        }
    }
    all.sort();
    all
}

fn finding(key: i64, what: &str, like: Option<i64>) -> (i64, String, Option<i64>) {
    (key, what.to_owned(), like)
}

#[test]
fn a_sample_is_skipped_for_the_first_reason_that_holds() {
    let (a, b) = (0, 1);
    let of = |content: u8, label: u32| (content, label, Split::Train, None);
    let mut samples = vec![of(1, a), of(1, b), of(2, b), of(2, b), of(2, b), of(4, a)];
    samples.extend((0..4).map(|i| of(3, i % 2)));
    let found = find(Duplicates { many_urls: 3, near_bits: 4 }, 0, &samples);
    let expected = [
        finding(0, "several_classes", Some(1)),
        finding(1, "several_classes", Some(0)),
        finding(3, "duplicate", Some(2)),
        finding(4, "duplicate", Some(2)),
        finding(6, "many_urls", Some(7)),
        finding(7, "many_urls", Some(6)),
        finding(8, "many_urls", Some(6)),
        finding(9, "many_urls", Some(6)),
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_test_picture_that_looks_like_a_training_one_is_skipped_and_other_likenesses_are_told() {
    let hash = 0x0123_4567_89ab_cdef;
    let samples = [
        (0, 0, Split::Test, Some(hash)),
        (1, 0, Split::Train, Some(hash ^ 0x8000_0000_0000_0011)),
        (2, 1, Split::Validation, Some(hash ^ 0xff)),
        (3, 1, Split::Train, Some(!hash)),
        (4, 1, Split::Train, Some(!hash)),
        (5, 0, Split::Test, Some(hash ^ 0x0f00_0f00_0f00)),
    ];
    let found = find(Duplicates { many_urls: 20, near_bits: 3 }, 0, &samples);
    assert_eq!(found, [finding(0, "near_training", Some(1)), finding(4, "looks like", Some(3))]);
}

#[test]
fn where_the_list_says_the_splits_it_is_the_training_picture_that_is_skipped() {
    let hash = 0x0123_4567_89ab_cdef;
    let samples = [
        (1, 0, Split::Train, None),
        (1, 0, Split::Test, None),
        (1, 0, Split::Validation, None),
        (2, 0, Split::Train, Some(hash)),
        (3, 1, Split::Test, Some(hash ^ 0x11)),
        (4, 1, Split::Train, Some(!hash)),
        (5, 1, Split::Train, Some(!hash)),
    ];
    let splits = proto::Splits { column: "split".to_owned(), ..proto::Splits::default() };
    let expected = [
        finding(0, "duplicate", Some(1)),
        finding(2, "duplicate", Some(0)),
        finding(3, "near_held_out", Some(4)),
        finding(6, "looks like", Some(5)),
    ];
    assert_eq!(found(&DatasetSpec { splits, ..DatasetSpec::default() }, &samples), expected);
}

#[test]
fn a_class_keeps_its_first_samples_by_key_once_all_others_are_out() {
    let samples: Vec<_> = [1, 1, 2, 3, 4, 5]
        .map(|content| (content, 0, Split::Train, None))
        .into_iter()
        .chain([(9, 1, Split::Test, None)])
        .collect();
    let found = find(Duplicates::default(), 3, &samples);
    let expected = [finding(1, "duplicate", Some(0)), finding(4, "class_full", None), finding(5, "class_full", None)];
    assert_eq!(found, expected);
}
