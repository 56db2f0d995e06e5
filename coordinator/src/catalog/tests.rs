use super::*;
use proto::{Rejection, files};
use std::collections::BTreeSet;
use std::io::Cursor;

fn options() -> ListOptions {
    ListOptions::default()
}

/// The lines of all slices in order.
fn lines(catalog: Catalog, spec: &mut DatasetSpec) -> Result<(Round, Vec<String>), Error> {
    let (sender, mut receiver) = mpsc::channel(1000);
    let round = catalog.cut(spec, &sender)?;
    drop(sender);
    let mut lines = Vec::new();
    while let Some((number, bytes)) = receiver.blocking_recv() {
        let text = proto::slice::unpack(&bytes).expect("own output");
        assert_eq!(text.lines().count(), round.slices[(number - round.first_slice) as usize].urls as usize);
        lines.extend(text.lines().map(str::to_owned));
    }
    Ok((round, lines))
}

fn row(url: &str) -> OutcomeRow {
    OutcomeRow { synset: "n1".to_owned(), url: url.to_owned(), ..OutcomeRow::default() }
}

fn cut(list: &str, mut spec: DatasetSpec) -> Result<(DatasetSpec, Round, Vec<String>), Error> {
    let mut catalog = Catalog::new(&spec, RoundStart::first("r"), None, Arc::default());
    catalog.read("list", Cursor::new(list.to_owned()), &options())?;
    let (round, lines) = lines(catalog, &mut spec)?;
    Ok((spec, round, lines))
}

#[test]
fn a_later_round_holds_what_is_tried_again_under_its_key_and_new_lines_under_the_next_ones() {
    let classes = vec![Class { synset: "n1".into(), name: "dog".into() }];
    let mut spec = DatasetSpec { classes, ..DatasetSpec::default() };
    let start = RoundStart { round: 2, first_slice: 7, first_key: 100, ..RoundStart::first("r2") };
    let mut catalog = Catalog::new(&spec, start.clone(), None, Arc::default());
    for url in ["http://a", "http://b"] {
        catalog.push_known("n1", url).expect("in memory");
    }
    let dealing = catalog.dealing;
    let columns = Some(r#"{"caption":"b"}"#.to_owned());
    let row = OutcomeRow { key: 41, columns, ..row("http://b") };
    catalog.retry(dealing, &row, Rejection::Timeout).expect("in memory");
    let list = "n1\thttp://c\nn1\thttp://a\nn2\thttp://a\nn1\thttp://c\nn1\thttp://d\nbad\n";
    catalog.read("list", Cursor::new(list), &options()).expect("reads");
    let (round, mut slices) = lines(catalog, &mut spec).expect("cuts");
    slices.sort();
    let keys: Vec<&str> = slices.iter().filter_map(|line| line.split('\t').next()).collect();
    assert_eq!(keys, ["100", "103", "41"]);
    assert_eq!(slices[2], "41\tn1\thttp://b\t{\"caption\":\"b\"}");
    assert_eq!((round.first_slice, round.new_urls, round.known, round.not_chosen), (7, 2, 1, 1));
    assert_eq!((round.repeated, round.bad_lines, round.end_key()), (1, 1, 104));
    assert_eq!((round.urls(), round.retried), (3, OutcomeCounts::from_iter([(Err(Rejection::Timeout), 1)])));

    let nothing = lines(Catalog::new(&spec, start, None, Arc::default()), &mut spec).expect("no error");
    assert_eq!((nothing.0.urls(), nothing.1.len()), (0, 0));
}

#[test]
fn a_known_url_under_another_class_is_a_bad_line_unless_pictures_may_have_several() {
    for (multi_label, bad) in [(None, 1), (Some(MultiLabel::First), 0)] {
        let mut spec = DatasetSpec { multi_label, ..DatasetSpec::default() };
        let start = RoundStart { round: 2, ..RoundStart::first("r2") };
        let mut catalog = Catalog::new(&spec, start, None, Arc::default());
        catalog.push_known("cat", "http://a").expect("in memory");
        let list = "cat\thttp://a\ndog\thttp://a\ndog\thttp://b\n";
        catalog.read("list", Cursor::new(list), &options()).expect("reads");
        let (round, _) = lines(catalog, &mut spec).expect("cuts");
        assert_eq!((round.new_urls, round.bad_lines, round.known), (1, bad, 2 - bad));
        let example = "http://a: is of class \"dog\" here, and \"cat\" before";
        assert_eq!(round.bad_line_examples, vec![example; bad as usize]);
    }
}

#[test]
fn each_dealing_has_slices_of_its_own() {
    let mut spec = DatasetSpec { slice_urls: 100, ..DatasetSpec::default() };
    let start = RoundStart { round: 2, cause: Cause::MayComeBack, ..RoundStart::first("r2") };
    let mut catalog = Catalog::new(&spec, start, None, Arc::default());
    let dealings = [(100, true), (100, false), (10, false), (1, false)];
    for (key, (slice_urls, once)) in (0..).zip(dealings.iter().cycle().take(48)) {
        let (dealing, url) = (Dealing { slice_urls: *slice_urls, once: *once }, format!("http://a{key}.com"));
        catalog.retry(dealing, &OutcomeRow { key, ..row(&url) }, Rejection::Unfetched).expect("in memory");
    }
    let (round, lines) = lines(catalog, &mut spec).expect("cuts");
    assert_eq!((round.cause, lines.len()), (Cause::MayComeBack, 48));
    let slices: Vec<_> = round.slices.iter().map(|slice| (slice.urls, slice.once)).collect();
    assert_eq!(slices, [vec![(1, false); 12], vec![(10, false), (2, false), (12, false), (12, true)]].concat());
}

#[test]
fn slices_hold_every_url_once_dealt_by_site_shuffled_by_seed_and_keyed_by_their_place_in_the_list() {
    let host = |i: u32| if i < 2349 { "a.large.com".to_owned() } else { format!("www.s{}.com", i % 5) };
    let list: String = (0..2500).map(|i| format!("n{}\thttp://{}/{i}\n", i % 3, host(i))).collect();
    let spec = DatasetSpec { slice_urls: 1000, seed: 7, ..DatasetSpec::default() };
    let (resolved, round, mut lines) = cut(&list, spec.clone()).expect("a good list");
    assert_eq!(round.slices.iter().map(|s| s.urls).collect::<Vec<_>>(), [151, 783, 783, 783]);
    let large = LargeSite { site: "large.com".to_owned(), first_slice: 1, slices: 3 };
    assert_eq!(round.large_sites, Some(vec![large]));
    assert!(lines[151..].iter().all(|line| line.contains("large")));
    assert_eq!((round.urls(), round.urls_per_class["n1"]), (2500, 833));
    assert_eq!(resolved.classes.iter().map(|c| c.synset.as_str()).collect::<Vec<_>>(), ["n0", "n1", "n2"]);
    assert_eq!(cut(&list, spec.clone()).expect("again").2, lines);
    assert_ne!(cut(&list, DatasetSpec { seed: 8, ..spec }).expect("again").2, lines);
    assert!(!lines[..151].is_sorted());
    lines.sort_by_key(|line| line.split('\t').next().and_then(|key| key.parse::<u32>().ok()));
    let listed: Vec<String> = (0..).zip(list.lines()).map(|(key, line)| format!("{key}\t{line}")).collect();
    assert_eq!(lines, listed);
}

#[test]
fn rows_of_one_span_stand_in_one_slice_wherever_their_file_is() {
    for place in ["file:///a.parquet", "https://a.large.com/a.parquet", "store:///imports/a.parquet"] {
        let row = |row: u32| format!("n1\t{place}#column=image&of=9&span={}&row={row}\n", row / files::SPAN);
        let list: String = (0..3000).map(row).collect();
        let spec = DatasetSpec { slice_urls: 600, ..DatasetSpec::default() };
        let (_, round, lines) = cut(&list, spec).expect("a good list");
        let slices = round.slices.iter().enumerate().flat_map(|(n, slice)| vec![n; slice.urls as usize]);
        let mut slices_of: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
        for (slice, line) in slices.zip(&lines) {
            let url = line.split('\t').nth(2).expect("a URL");
            slices_of.entry(files::span(url).expect("a row")).or_default().insert(slice);
        }
        assert!(slices_of.values().all(|slices| slices.len() == 1) && round.slices.len() >= 4, "{place}");
        // In slices that are smaller no site is made up, of which one would be leased at a time.
        let (_, round, lines) = cut(&list, DatasetSpec { slice_urls: 100, ..DatasetSpec::default() }).expect("as good");
        let large: Vec<String> = round.large_sites.into_iter().flatten().map(|large| large.site).collect();
        assert!(large.iter().all(|site| site == "large.com"), "{place}: {large:?}");
        assert!(lines.len() == 3000 && round.slices.iter().all(|slice| slice.urls < 200), "{place}");
    }
}

#[test]
fn a_picture_of_several_classes_is_fetched_once_as_the_caller_says() {
    let list = "dog\thttp://a\ncat\thttp://b\ncat\thttp://a\ndog\thttp://a\ndog\thttp://c\ncat\thttp://d\n";
    let error = cut(list, DatasetSpec::default()).expect_err("several classes").to_string();
    assert!(error.contains("1 of 4 pictures") && error.contains("http://a (dog, cat)"), "{error}");
    assert!(error.contains("--multi-label"), "{error}");
    let with = |multi_label| DatasetSpec { multi_label: Some(multi_label), ..DatasetSpec::default() };
    let of = |multi_label| {
        let (_, round, mut lines) = cut(list, with(multi_label)).expect("it is said what is meant");
        lines.sort();
        assert_eq!((round.several, round.repeated), (1, 1));
        (round.new_urls, lines[0].clone())
    };
    assert_eq!(of(MultiLabel::First), (4, "0\tdog\thttp://a".to_owned()));
    assert_eq!(of(MultiLabel::All), (4, "0\tdog\thttp://a\t{\"synsets\":[\"dog\",\"cat\"]}".to_owned()));
    assert_eq!(of(MultiLabel::Drop), (3, "1\tcat\thttp://b".to_owned()));
    // Of one class among those that were chosen it is a picture like any other.
    let classes = vec![Class { synset: "dog".into(), name: String::new() }];
    let (_, round, _) = cut(list, DatasetSpec { classes, ..DatasetSpec::default() }).expect("one class");
    assert_eq!((round.several, round.new_urls, round.not_chosen), (0, 2, 3));
}

#[test]
fn a_picture_of_more_classes_than_fit_is_a_bad_line() {
    let of = |n| format!("n{n}\thttp://a\nn{n}\thttp://b/{n}\nn{n}\thttp://c/{n}\n");
    let spec = DatasetSpec { multi_label: Some(MultiLabel::All), ..DatasetSpec::default() };
    let (_, round, lines) = cut(&(0..9000).map(of).collect::<String>(), spec).expect("all others are good");
    assert_eq!((round.bad_lines, round.new_urls, lines.len()), (1, 18_000, 18_000));
    assert!(round.bad_line_examples[0].starts_with("http://a: stands in 9000 classes"), "{round:?}");
}

#[test]
fn classes_that_nobody_can_have_meant_are_refused() {
    let captions: String = (0..12).map(|i| format!("a dog at place {i}\thttp://h/{i}\n")).collect();
    let few: String = captions.lines().take(3).map(|line| format!("{line}\n")).collect();
    for list in [&captions, &few] {
        let error = cut(list, DatasetSpec::default()).expect_err("captions").to_string();
        assert!(error.contains("have a class of their own") && error.contains("--unlabelled"), "{error}");
    }
    let classes = captions.lines().filter_map(|line| line.split_once('\t'));
    let classes = classes.map(|(synset, _)| Class { synset: synset.to_owned(), name: String::new() }).collect();
    assert!(cut(&captions, DatasetSpec { classes, ..DatasetSpec::default() }).is_ok(), "they were chosen");
    assert!(cut("dog\thttp://a\ncat\thttp://b\n", DatasetSpec::default()).is_ok(), "one picture each");
}

#[test]
fn a_limit_takes_a_sample_that_the_seed_chooses() {
    let list: String = (0..3000).map(|i| format!("n{}\thttp://h/{i}\n", i % 3)).collect();
    let sample = |seed| {
        let mut spec = DatasetSpec { seed, ..DatasetSpec::default() };
        let mut catalog = Catalog::new(&spec, RoundStart::first("r"), None, Arc::default()).limited(300, u64::MAX);
        catalog.read("list", Cursor::new(list.clone()), &options()).expect("reads");
        lines(catalog, &mut spec).expect("cuts")
    };
    let (round, first) = sample(1);
    assert_eq!((round.new_urls, first.len()), (300, 300));
    assert!(round.urls_per_class.values().all(|urls| (70..130).contains(urls)), "{:?}", round.urls_per_class);
    assert_eq!(sample(1).1, first);
    let both = sample(2).1.iter().filter(|line| first.contains(line)).count();
    assert!(both < 70, "{both} of 300 are in both samples");
}

#[test]
fn chosen_classes_keep_their_order_and_names_and_the_rest_is_counted() {
    let classes =
        vec![Class { synset: "n2".into(), name: "dog".into() }, Class { synset: "n1".into(), name: String::new() }];
    let spec = DatasetSpec { classes, ..DatasetSpec::default() };
    let (spec, round, lines) = cut("n1\thttp://a\nn2\thttp://b\nn3\thttp://c\nbad\n", spec).expect("a good list");
    assert_eq!((round.urls(), round.not_chosen, round.bad_lines, lines.len()), (2, 1, 1, 2));
    assert_eq!(round.bad_line_examples, ["list:4: no tab between synset and URL"]);
    assert_eq!(spec.classes.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["dog", ""]);
    let none = DatasetSpec { classes: vec![Class { synset: "x".into(), name: "x".into() }], ..spec };
    assert!(matches!(cut("n1\thttp://a\n", none), Err(Error::Invalid(_))));
}
