use super::*;

#[test]
fn a_spec_of_one_line_has_defaults_for_the_rest_and_round_trips() {
    let spec = RunSpec::from_toml("dataset = \"birds\"").expect("one line is enough");
    assert_eq!(spec.train, Train::default());
    assert_eq!(RunSpec::from_json(&spec.to_json()).expect("own output"), spec);
}

#[test]
fn a_spec_without_a_plan_is_of_the_first_and_stays_as_it_was_written() {
    let old = RunSpec::from_json(r#"{"dataset": "birds", "manifest": 1}"#).expect("as it was stored once");
    assert_eq!(old.plan(), Plan::Spread);
    assert!(!old.to_json().contains("plan"), "agents of before there was a plan read it too");
    let new = RunSpec { plan: Some(Plan::NEWEST), ..old };
    assert!(new.to_json().contains("\"plan\": 2"), "{}", new.to_json());
    assert_eq!(RunSpec::from_json(&new.to_json()).expect("own output").plan(), Plan::Equal);
}

#[test]
fn arithmetic_is_chosen_by_a_word_and_is_f32_by_itself() {
    let precision = |toml: &str| RunSpec::from_toml(toml).expect(toml).ranks.precision;
    assert_eq!(precision("dataset = \"b\""), Precision::F32);
    for (word, expected) in
        [("f32", Precision::F32), ("tf32", Precision::Tf32), ("f64", Precision::F64), ("bf16", Precision::Bf16)]
    {
        let spec = RunSpec::from_toml(&format!("dataset = \"b\"\nranks = {{ precision = \"{word}\" }}"));
        let spec = spec.expect("each of them is known");
        assert_eq!(spec.ranks.precision, expected);
        assert!(spec.to_json().contains(&format!("\"precision\": \"{word}\"")), "{}", spec.to_json());
    }
}

#[test]
fn a_layout_is_stored_only_if_it_was_chosen() {
    let spec = |toml: &str| RunSpec::from_toml(&format!("dataset = \"b\"\n{toml}")).expect(toml);
    assert!(!spec("").to_json().contains("layout"), "agents of before there was a choice read it too");
    for (word, layout) in [("auto", Layout::Auto), ("nchw", Layout::Nchw), ("nhwc", Layout::Nhwc)] {
        let chosen = spec(&format!("ranks = {{ layout = \"{word}\" }}"));
        assert_eq!(chosen.ranks.layout, layout);
        assert_eq!(RunSpec::from_json(&chosen.to_json()).expect("own output"), chosen);
    }
    let error = RunSpec::from_toml("dataset = \"b\"\nranks = { layout = \"nhcw\" }").expect_err("a typing error");
    assert!(error.to_string().contains("nhwc"), "{error}");
}

#[test]
fn graphs_are_off_by_themselves_and_stored_only_if_they_were_chosen() {
    let spec = |toml: &str| RunSpec::from_toml(&format!("dataset = \"b\"\n{toml}")).expect(toml);
    for toml in ["", "ranks = { graphs = false }"] {
        assert!(!spec(toml).ranks.graphs);
        assert!(!spec(toml).to_json().contains("graphs"), "agents of before there was a choice read it too");
    }
    let chosen = spec("ranks = { graphs = true }");
    assert!(chosen.ranks.graphs);
    assert_eq!(RunSpec::from_json(&chosen.to_json()).expect("own output"), chosen);
}

#[test]
fn lanes_and_ranks_that_nobody_chose_follow_from_what_was_chosen() {
    let resolved = |toml: &str| {
        let spec = RunSpec::from_toml(&format!("dataset = \"b\"\n{toml}")).expect(toml);
        (spec.ranks.lanes, spec.ranks.max, spec.warnings().len())
    };
    assert_eq!(resolved(""), (8, 8, 0));
    assert_eq!(resolved("[train]\nbatch = 16"), (1, 1, 0));
    assert_eq!(resolved("[train]\nbatch = 100"), (6, 6, 0));
    assert_eq!(resolved("[ranks]\nlanes = 4"), (4, 4, 0));
    assert_eq!(resolved("[ranks]\nlanes = 12"), (12, 8, 0));
    assert_eq!(resolved("[ranks]\nmax = 1"), (8, 1, 0));
    assert_eq!(resolved("[ranks]\nmax = 16"), (16, 16, 0));
    assert_eq!(resolved("[train]\nbatch = 16\n[ranks]\nmin = 4"), (4, 4, 1));
    assert_eq!(resolved("model = { arch = \"alexnet\" }\ntrain = { batch = 16 }\nranks = { min = 4 }"), (4, 4, 0));
}

#[test]
fn unknown_keys_and_impossible_values_are_refused_by_name() {
    for (toml, said) in [
        ("dataset = \"b\"\n[train]\nlr = 1", "lr"),
        ("dataset = \"b\"\n[model]\narch = \"vgg\"", "alexnet-bn"),
        ("dataset = \"b\"\n[train]\nbatch = 8\n[ranks]\nlanes = 8", "2 x ranks.lanes"),
        ("dataset = \"b\"\n[ranks]\nlanes = 8\nmax = 9", "1 to ranks.lanes"),
        ("dataset = \"b\"\nplan = 3", "must be 1 or 2"),
        ("dataset = \"b\"\n[train]\nfreeze = [\"feature\"]", "\"feature\": must be a part of the network"),
        ("dataset = \"b\"\n[train]\nfreeze = [\"features\", \"classifier\"]", "less than the whole"),
    ] {
        let error = RunSpec::from_toml(toml).expect_err(toml).to_string();
        assert!(error.contains(said), "{error}");
    }
}
