use super::*;
use proto::Split;
use proto::shard::hex;

/// Finds in samples of (content, label, split, perceptual hash); each one's key is its place in the list.
fn find(
    rules: Duplicates,
    per_class: u32,
    samples: &[(u8, u32, Split, Option<u64>)],
) -> Vec<(i64, String, Option<i64>)> {
    let mut finder = Finder::new(rules, per_class, None);
    for (key, &(content, label, split, hash)) in (0u64..).zip(samples) {
        let row = OutcomeRow {
            key: key as i64,
            sha256: Some(hex(&[content; 32])),
            phash: hash.map(|hash| format!("{hash:016x}")),
            split: Some(split.name().to_owned()),
            ..OutcomeRow::default()
        };
        let place = Place { key, shard: (key % 3) as u32, ordinal: (key / 3) as u32 };
        finder.keep(place, label, &row, true).expect("in memory").expect("a whole row");
    }
    let found = finder.find().expect("in memory");
    let mut marks = Vec::new();
    for partition in found.findings {
        for (shard, of_shard) in partition.expect("in memory") {
            for mark in of_shard {
                assert_eq!(
                    mark.skip.is_some(),
                    found.skips.get(&shard).is_some_and(|skips| skips.contains(mark.place.1))
                );
                let finding = mark.finding();
                marks.push((finding.key, finding.skipped.unwrap_or_else(|| "looks like".to_owned()), finding.like));
            }
        }
    }
    marks.sort();
    marks
}

fn mark(key: i64, what: &str, like: Option<i64>) -> (i64, String, Option<i64>) {
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
        mark(0, "several_classes", Some(1)),
        mark(1, "several_classes", Some(0)),
        mark(3, "duplicate", Some(2)),
        mark(4, "duplicate", Some(2)),
        mark(6, "many_urls", Some(7)),
        mark(7, "many_urls", Some(6)),
        mark(8, "many_urls", Some(6)),
        mark(9, "many_urls", Some(6)),
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
    assert_eq!(found, [mark(0, "near_training", Some(1)), mark(4, "looks like", Some(3))]);
}

#[test]
fn a_class_keeps_its_first_samples_by_key_once_all_others_are_out() {
    let samples: Vec<_> = [1, 1, 2, 3, 4, 5]
        .map(|content| (content, 0, Split::Train, None))
        .into_iter()
        .chain([(9, 1, Split::Test, None)])
        .collect();
    let found = find(Duplicates::default(), 3, &samples);
    let expected = [mark(1, "duplicate", Some(0)), mark(4, "class_full", None), mark(5, "class_full", None)];
    assert_eq!(found, expected);
}

#[test]
fn records_are_what_they_were_written_as() {
    let place = Place { key: 1 << 40, shard: 7, ordinal: 9 };
    let record = Record { sha256: [3; 32], label: 5, place, train: true, phash: Some(u64::MAX) };
    assert_eq!(Record::decode(&record.encode()), record);
    let look = Look { hash: 77, place, train: false };
    assert_eq!(Look::decode(&look.encode()), look);
    let entry = Entry { label: 8, place };
    assert_eq!(Entry::decode(&entry.encode()), entry);
    for mark in [Mark::new(place, Some(Skip::NearTraining), Some((4, 2))), Mark::new(place, None, None)] {
        assert_eq!(Mark::decode(&mark.encode()), mark);
    }
}
