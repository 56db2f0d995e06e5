use super::*;

#[test]
fn an_empty_spec_is_the_default_and_round_trips() {
    let spec = DatasetSpec::from_json("{}").expect("all fields have defaults");
    assert_eq!(spec, DatasetSpec::default());
    assert_eq!(DatasetSpec::from_json(&spec.to_json()).expect("own output"), spec);
}

#[test]
fn unknown_keys_and_impossible_values_are_refused_by_name() {
    for (json, said) in [
        (r#"{"resise": {}}"#, "resise"),
        (r#"{"resize": {"size": 0}}"#, "resize.size = 0"),
        (r#"{"resize": {"mode": "border"}}"#, "`keep-ratio`"),
        (r#"{"resize": {"format": "gif"}}"#, "`png`"),
        (r#"{"splits": {"validation": 0.9}}"#, "splits.validation = 0.9"),
        (r#"{"classes": [{"synset": "a"}, {"synset": "a"}]}"#, "named once only"),
        (r#"{"classes": [{"synset": "a "}]}"#, "no white space at its ends"),
        (r#"{"classes": [{"synset": "a"}], "unlabelled": true}"#, "must be false"),
        (r#"{"multi_label": "some"}"#, "`first`, `all`, `drop`"),
    ] {
        let error = DatasetSpec::from_json(json).expect_err(json).to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn what_older_datasets_may_have_chosen_is_read_and_not_chosen_anew() {
    for (json, said) in [
        (r#"{"limits": {"redirects": 21}}"#, "limits.redirects = 21: must be at most 20"),
        (r#"{"slice_urls": 100001}"#, "slice_urls = 100001: must be at most 100000"),
        (r#"{"slice_urls": 0}"#, "slice_urls = 0: must be"),
    ] {
        let error = DatasetSpec::from_new_json(json).expect_err(json).to_string();
        assert!(error.contains(said), "{error}");
        assert_eq!(DatasetSpec::from_json(json).is_ok(), !json.contains(": 0"), "{json}");
    }
    let most = r#"{"limits": {"redirects": 20}, "slice_urls": 100000}"#;
    assert_eq!(
        DatasetSpec::from_new_json(most).expect("both may be"),
        DatasetSpec::from_json(most).expect("both may be")
    );
}

#[test]
fn the_smallest_side_is_what_mode_and_limits_leave() {
    let limits = Limits { min_side: 64, max_aspect: 8.0, ..Limits::default() };
    for (mode, upscaled, as_it_is) in [
        (ResizeMode::Cover, 256, 64),
        (ResizeMode::Fit, 32, 32),
        (ResizeMode::Pad, 256, 256),
        (ResizeMode::KeepRatio, 256, 64),
        (ResizeMode::None, 64, 64),
    ] {
        let of = |upscale| Resize { mode, upscale, ..Resize::default() }.smallest_side(&limits);
        assert_eq!((of(true), of(false)), (upscaled, as_it_is), "{mode:?}");
    }
}

#[test]
fn the_split_depends_on_content_and_salt_alone_and_keeps_the_shares() {
    let splits = Splits::default();
    let mut counts = [0; 3];
    for i in 0..20_000u32 {
        let mut sha = [0; 32];
        sha[..4].copy_from_slice(&i.to_be_bytes());
        counts[splits.split_of(&sha) as usize] += 1;
    }
    let [_, validation, test] = counts;
    assert!((900..1100).contains(&validation) && (900..1100).contains(&test), "{counts:?}");
    let other = Splits { salt: "x".into(), ..splits.clone() };
    assert!((0..64).any(|i| splits.split_of(&[i; 32]) != other.split_of(&[i; 32])));
}

#[test]
fn a_list_says_the_splits_by_the_names_that_published_datasets_use() {
    let splits = Splits { column: "split".into(), ..Splits::default() };
    for (row, split) in [
        (r#"{"split":"train"}"#, Some(Split::Train)),
        (r#"{"a":1,"split":"VAL"}"#, Some(Split::Validation)),
        (r#"{"split":"dev"}"#, Some(Split::Validation)),
        (r#"{"split":"test"}"#, Some(Split::Test)),
        (r#"{"split":"train2"}"#, None),
        (r#"{"split":1}"#, None),
        (r#"{"other":"test"}"#, None),
        ("", None),
    ] {
        assert_eq!(splits.published(Some(row)), split, "{row}");
    }
    assert_eq!(splits.published(None), None);
    assert_eq!(Splits::default().published(Some(r#"{"split":"test","":"test"}"#)), None);
}
