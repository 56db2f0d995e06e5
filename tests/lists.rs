//! Lists as they are published, through real processes: what is read of them, and what of it comes out again.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Output;

use bytes::Bytes;
use demo_origin::list;
use demo_origin::origin::{Options, Origin};
use demo_origin::rot::Rot;
use proto::shard::split_block;
use proto::{Manifest, Split, Stored};
use serde_json::{Value, json};
use support::Cluster;

fn web() -> Origin {
    Origin::serve(Options { seed: 5, ..Options::default() }).expect("loopback")
}

/// Addresses of as many pictures.
fn urls(origin: &Origin, pictures: u64) -> Vec<String> {
    (0..pictures).map(|n| list::url(Rot::Good, (0, n), n, origin)).collect()
}

const SMALL: [&str; 7] = ["--size", "64", "--validation", "0", "--test", "0", "--wait"];

fn create(cluster: &Cluster, name: &str, list: &str, more: &[&str]) -> Output {
    cluster.try_gleaner(&[&["dataset", "create", name, "--urls", list, "--timeout", "120s"], &SMALL[..], more].concat())
}

fn created(cluster: &Cluster, name: &str, list: &str, more: &[&str]) -> Manifest {
    let output = create(cluster, name, list, more);
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    Manifest::from_json(cluster.gleaner(&["dataset", "manifest", name]).as_bytes()).expect("a manifest")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

/// What stands beside each picture in the dataset's tars, by key: endings of the members, JSON and text.
fn samples(cluster: &Cluster, manifest: &Manifest) -> BTreeMap<u64, (String, Value, String)> {
    let mut samples = BTreeMap::new();
    for tar in manifest.shards.iter().flat_map(|shard| shard.tars.values()) {
        let bytes = Bytes::from(std::fs::read(Path::new(cluster.store()).join(&tar.key)).expect("a tar"));
        for block in &tar.blocks {
            let block = bytes.slice(block.offset as usize..(block.offset + block.length) as usize);
            for sample in split_block(&block).expect("a block") {
                let (mut endings, mut json, mut text) = (Vec::new(), Value::Null, String::new());
                let mut archive = tar::Archive::new(sample.members.as_ref());
                for member in archive.entries().expect("a tar") {
                    let mut member = member.expect("whole");
                    let name = member.path().expect("a name").display().to_string();
                    let ending = name.split_once('.').expect("an ending").1.to_owned();
                    match ending.as_str() {
                        "json" => json = serde_json::from_reader(&mut member).expect("JSON"),
                        "txt" => drop(std::io::Read::read_to_string(&mut member, &mut text).expect("text")),
                        _ => {}
                    }
                    endings.push(ending);
                }
                samples.insert(sample.key, (endings.join(" "), json, text));
            }
        }
    }
    samples
}

#[test]
fn a_list_of_captions_is_refused_as_classes_and_gathered_without() {
    let origin = web();
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    // As CC3M has it: the caption first, no header, the URL's place found by content.
    let list: String =
        (0..).zip(urls(&origin, 12)).map(|(n, url)| format!("a very typical place number {n}\t{url}\n")).collect();
    let list = cluster.write("cc3m.tsv", &list);
    let refused = create(&cluster, "captions", &list, &[]);
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    assert!(said(&refused).contains("12 of 12 pictures have a class of their own"), "{}", said(&refused));
    assert!(said(&refused).contains("--unlabelled"), "{}", said(&refused));
    assert!(cluster.json(&["dataset", "list"]).as_array().is_some_and(Vec::is_empty));

    let flags = ["--unlabelled", "--keep-columns", "caption"];
    let dry = create(&cluster, "captions", &list, &[&flags[..], &["--dry-run"]].concat());
    let text = said(&dry);
    assert!(dry.status.success() && text.contains("column 2 is the URL, no class; kept: caption"), "{text}");
    assert!(text.contains("12 URLs") && text.contains("nothing was created"), "{text}");
    assert!(text.contains("disk: about") && text.contains("time: at least"), "{text}");
    assert!(cluster.json(&["dataset", "list"]).as_array().is_some_and(Vec::is_empty));

    let manifest = created(&cluster, "captions", &list, &flags);
    assert_eq!(manifest.samples(Split::Train), 12);
    let samples = samples(&cluster, &manifest);
    assert_eq!(samples.len(), 12);
    for (key, (members, json, text)) in &samples {
        assert_eq!((members.as_str(), text), ("jpg txt json", &format!("a very typical place number {key}")));
        assert_eq!((&json["caption"], json.get("synset")), (&json!(text), None));
    }
    let run = cluster.try_gleaner(&["run", "submit", "--dataset", "captions", "--set", "seed=1"]);
    assert!(!run.status.success() && said(&run).contains("--unlabelled"), "{}", said(&run));
    let folder = cluster.path("tree").display().to_string();
    cluster.gleaner(&["dataset", "export", "captions", "--to", &folder, "--as", "tree"]);
    let exported = std::fs::read_dir(Path::new(&folder).join("train/unlabelled")).expect("one folder");
    assert_eq!(exported.count(), 12);
    let sheet = cluster.path("sheet.png").display().to_string();
    let rows = cluster.json(&["dataset", "sample", "captions", "--to", &sheet]);
    assert!(rows[0]["pictures"].as_u64().is_some_and(|pictures| pictures > 0), "{rows}");
    cluster.gleaner(&["fsck", "--deep"]);
}

#[test]
fn a_picture_of_several_classes_is_fetched_once_and_keeps_all_of_them() {
    let origin = web();
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    // As Open Images has it, its label file joined: a row for each class, also for those that are not in the picture.
    let rows = |(n, url): (u64, String)| {
        let row = |class: &str, confidence: u8| format!("{n:016x},{url},cc-by,\"Doe, Jane\",{class},{confidence}\n");
        match n {
            0..4 => [row("/m/dog", 1), row("/m/cat", 0)].concat(),
            4..8 => [row("/m/cat", 1), row("/m/cat", 1)].concat(),
            _ => [row("/m/dog", 1), row("/m/cat", 1)].concat(),
        }
    };
    let head = "ImageID,OriginalURL,License,Author,LabelName,Confidence\n";
    let list = head.to_owned() + &(0..).zip(urls(&origin, 10)).map(rows).collect::<String>();
    let list = cluster.write("open-images.csv", &list);
    let refused = create(&cluster, "open", &list, &[]);
    assert!(said(&refused).contains("2 of 10 pictures have several classes"), "{}", said(&refused));
    assert!(said(&refused).contains("--multi-label"), "{}", said(&refused));

    let keep = ["--keep-columns", "author,license"];
    let first = created(&cluster, "first", &list, &[&keep[..], &["--multi-label", "first"]].concat());
    let per_class = |manifest: &Manifest| -> Vec<(String, u64)> {
        manifest.classes.iter().map(|class| (class.synset.clone(), class.total())).collect()
    };
    assert_eq!(per_class(&first), [("/m/cat".to_owned(), 4), ("/m/dog".to_owned(), 6)]);
    assert!(samples(&cluster, &first).values().all(|(members, json, _)| {
        members == "jpg cls json" && json["author"] == "Doe, Jane" && json["license"] == "cc-by"
    }));
    let dropped = created(&cluster, "dropped", &list, &["--multi-label", "drop"]);
    assert_eq!(per_class(&dropped), [("/m/cat".to_owned(), 4), ("/m/dog".to_owned(), 4)]);

    let all = created(&cluster, "all", &list, &["--multi-label", "all"]);
    assert_eq!(per_class(&all), [("/m/cat".to_owned(), 4), ("/m/dog".to_owned(), 4)]);
    let samples = samples(&cluster, &all);
    assert_eq!(samples.len(), 10, "each picture is fetched and stored once");
    let several: Vec<_> = samples.values().filter(|(members, ..)| members == "jpg json").collect();
    assert_eq!(several.len(), 2);
    assert!(several.iter().all(|(_, json, _)| json["synsets"] == json!(["/m/dog", "/m/cat"])));
    let folder = cluster.path("tars").display().to_string();
    let told = cluster.gleaner(&["dataset", "export", "all", "--to", &folder, "--as", "webdataset"]);
    assert!(told.contains("8 images, and 2 of several classes,"), "{told}");
    let (mut pictures, mut classes) = (0, 0);
    for tar in std::fs::read_dir(Path::new(&folder).join("train")).expect("tars") {
        let mut archive = tar::Archive::new(std::fs::File::open(tar.expect("a tar").path()).expect("a tar"));
        for member in archive.entries().expect("a tar") {
            let name = member.expect("whole").path().expect("a name").display().to_string();
            pictures += u32::from(name.ends_with(".jpg"));
            classes += u32::from(name.ends_with(".cls"));
        }
    }
    assert_eq!((pictures, classes), (10, 8), "they are exported for other tools");
    cluster.gleaner(&["fsck", "--deep"]);
}

#[test]
fn what_a_url_gives_now_must_be_what_was_listed_if_that_is_wanted() {
    let origin = web();
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    let urls = urls(&origin, 6);
    let plain: String = urls.iter().map(|url| format!("{url},dog\n")).collect();
    let plain = cluster.write("plain.csv", &("url,label\n".to_owned() + &plain));
    let manifest = created(&cluster, "plain", &plain, &[]);
    let digests: BTreeMap<String, String> = samples(&cluster, &manifest)
        .into_values()
        .map(|(_, json, _)| [&json["url"], &json["sha256"]].map(|text| text.as_str().expect("text").to_owned()).into())
        .collect();
    // One has changed, and of one nothing is known.
    let row = |(n, url): (usize, &String)| {
        let digest = match n {
            0 => "00".repeat(32),
            1 => String::new(),
            _ => digests[url].to_uppercase(),
        };
        format!("{url},dog,{digest}\n")
    };
    let rows: String = urls.iter().enumerate().map(row).collect();
    let list = cluster.write("digests.csv", &("url,label,sha256\n".to_owned() + &rows));
    let manifest = created(&cluster, "verified", &list, &["--verify", "sha256:sha256"]);
    let outcomes: BTreeMap<&str, u64> =
        manifest.outcomes.iter().map(|(outcome, n)| (proto::rejection::outcome_name(outcome), n)).collect();
    assert_eq!(outcomes, [("changed", 1), ("kept", 5)].into());
}

#[test]
fn classes_with_blanks_and_of_any_script_have_folders_of_their_own() {
    let origin = web();
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    let classes = ["golden retriever", "金毛犬", "a/b", "a_b"];
    let rows = (0..).zip(urls(&origin, 12)).map(|(n, url)| format!("{url},{}\n", classes[n % 4]));
    let list = cluster.write("names.csv", &("url,label\n".to_owned() + &rows.collect::<String>()));
    let manifest = created(&cluster, "names", &list, &[]);
    assert_eq!(manifest.classes.len(), 4);
    assert!(manifest.classes.iter().all(|class| class.total() == 3));
    let folder = cluster.path("tree").display().to_string();
    cluster.gleaner(&["dataset", "export", "names", "--to", &folder, "--as", "tree"]);
    let folders = std::fs::read_dir(Path::new(&folder).join("train")).expect("a folder a class");
    let pictures = folders.map(|folder| std::fs::read_dir(folder.expect("a folder").path()).expect("a folder").count());
    assert_eq!(pictures.collect::<Vec<_>>(), [3, 3, 3, 3]);
}

#[test]
fn a_sample_of_a_list_is_as_large_as_was_asked_for_and_columns_come_again_in_a_later_round() {
    let origin = web();
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    let rows = (0..).zip(urls(&origin, 30)).map(|(n, url)| format!("{url}\ta place {n}\n"));
    let list = cluster.write("cc12m.tsv", &rows.collect::<String>());
    let flags = ["--columns", "url,caption", "--unlabelled", "--keep-columns", "all"];
    let manifest = created(&cluster, "sample", &list, &[&flags[..], &["--limit", "8"]].concat());
    assert_eq!(manifest.samples(Split::Train), 8);
    cluster.gleaner(&["dataset", "refresh", "sample", "--urls", &list, "--columns", "url,caption", "--wait"]);
    let manifest = Manifest::from_json(cluster.gleaner(&["dataset", "manifest", "sample"]).as_bytes()).expect("one");
    assert_eq!((manifest.rounds, manifest.samples(Split::Train)), (2, 30));
    let samples = samples(&cluster, &manifest);
    assert!(samples.values().all(|(_, json, text)| text.starts_with("a place") && json["caption"] == json!(text)));
    let texts: std::collections::HashSet<&String> = samples.values().map(|(_, _, text)| text).collect();
    assert_eq!(texts.len(), 30);
}
