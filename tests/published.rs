//! Lists as they are published and what other tools read of them: made-up samples of each, and Hugging Face's
//! `datasets`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use demo_origin::list;
use demo_origin::origin::{Options, Origin};
use demo_origin::rot::Rot;
use proto::{DatasetId, Manifest, Split, Stored, keys, shard};
use serde_json::Value;
use support::dataset::{self, Dataset, picture};
use support::{Cluster, binary, process, python, root};

fn printed(command: &mut Command, input: &str) -> String {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it can be started");
    child.stdin.take().expect("it is piped").write_all(input.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{command:?}: {}", output.status);
    String::from_utf8(output.stdout).expect("text")
}

fn script(name: &str) -> Command {
    let mut command = python("python");
    command.arg(root().join("tests/python").join(name));
    command
}

#[test]
fn a_sample_of_each_published_list_comes_out_of_webdataset_with_its_classes_captions_and_columns() {
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    let origin = Origin::serve(Options { seed: 9, ..Options::default() }).expect("loopback");
    let urls: Vec<String> = (0..9).map(|n| list::url(Rot::Good, (n as usize % 3, n), n, &origin)).collect();
    let folder = cluster.path("lists");
    std::fs::create_dir(&folder).expect("writable");
    let written = printed(script("published.py").arg(&folder), &serde_json::json!(urls).to_string());
    let expected: BTreeMap<String, BTreeMap<String, Value>> = serde_json::from_str(&written).expect("JSON");
    assert_eq!(expected.len(), 7);
    let unlabelled = |keep| vec!["--unlabelled", "--keep-columns", keep];
    for (list, rows) in expected {
        let flags = match list.as_str() {
            "cc3m.tsv" | "cc12m.tsv" => unlabelled("caption"),
            "openimages.csv" => vec!["--multi-label", "first", "--keep-columns", "License,Author,Title"],
            "imagenet_fall11_urls.tgz" => vec![],
            _ => unlabelled("all"),
        };
        let (name, _) = list.split_once('.').expect("an ending");
        let (name, path) = (name.replace('_', "-"), folder.join(&list).display().to_string());
        let always = ["--size", "64", "--validation", "0", "--test", "0", "--wait", "--timeout", "120s"];
        cluster.gleaner(&[&["dataset", "create", &name, "--urls", &path], &flags[..], &always].concat());
        let manifest = Manifest::from_json(cluster.gleaner(&["dataset", "manifest", &name]).as_bytes()).expect("one");
        let tars = manifest.shards.iter().flat_map(|shard| shard.tars.values());
        let tars: Vec<PathBuf> = tars.map(|tar| Path::new(cluster.store()).join(&tar.key)).collect();
        let read = printed(script("read_columns.py").args(&tars), "");
        let samples: Vec<Value> = read.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(samples.len(), rows.len(), "{list}");
        for sample in samples {
            let row = &rows[sample["json"]["url"].as_str().expect("a text")];
            let class = sample["cls"].as_u64().map(|label| manifest.classes[label as usize].synset.as_str());
            assert_eq!((class, sample["txt"].as_str()), (row["class"].as_str(), row["caption"].as_str()), "{list}");
            for (column, value) in row["columns"].as_object().expect("an object") {
                assert_eq!(&sample["json"][column], value, "{list}: {column}");
            }
        }
    }
}

#[test]
fn hugging_faces_datasets_loads_the_same_pixels_classes_captions_and_splits() {
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    let origin = Origin::serve(Options { seed: 9, ..Options::default() }).expect("loopback");
    let class = |n: u64| ["golden retriever", "金毛犬", "/m/01yrx"][n as usize % 3];
    let row = |n: u64| {
        let url = list::url(Rot::Good, (n as usize % 3, n), n, &origin);
        let caption = format!("a \"dog\", été {n}");
        serde_json::json!({ "url": url, "label": class(n), "caption": caption, "license": n })
    };
    let list: String = (0..40).map(|n| format!("{}\n", row(n))).collect();
    let list = cluster.write("list.jsonl", &list);
    let flags = ["--keep-columns", "all", "--size", "64", "--slice-urls", "15", "--validation", "0.2", "--test", "0.2"];
    let wait = ["--wait", "--timeout", "120s"];
    cluster.gleaner(&[&["dataset", "create", "dogs", "--urls", &list], &flags[..], &wait].concat());
    let manifest = Manifest::from_json(cluster.gleaner(&["dataset", "manifest", "dogs"]).as_bytes()).expect("one");
    let mut ours = BTreeMap::new();
    for (split, tar) in manifest.shards.iter().flat_map(|shard| &shard.tars) {
        let bytes = Bytes::from(std::fs::read(Path::new(cluster.store()).join(&tar.key)).expect("a tar"));
        for block in &tar.blocks {
            let range = block.offset as usize..(block.offset + block.length) as usize;
            for sample in shard::read_block(&bytes.slice(range)).expect("a block") {
                let image = turbojpeg::decompress(&sample.image, turbojpeg::PixelFormat::RGB).expect("a JPEG");
                let row = row(sample.key);
                let found = serde_json::json!({
                    "split": split.name(), "key": sample.key, "class": row["label"], "text": row["caption"], "url": row["url"],
                    "pixels": shard::sha256_hex(&image.pixels), "columns": {"caption": row["caption"], "license": sample.key},
                });
                ours.insert(sample.key, found);
            }
        }
    }
    let (to, cache) = (cluster.path("parquet"), cluster.path("cache"));
    cluster.gleaner(&["dataset", "export", "dogs", "--to", &to.display().to_string(), "--as", "parquet"]);
    let read = printed(script("read_parquet.py").arg(&to).arg(&cache), "");
    let read = read.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let theirs: Vec<Value> = read.collect();
    let counted: u64 = Split::ALL.iter().map(|split| manifest.samples(*split)).sum();
    assert!(theirs.len() as u64 == counted && Split::ALL.iter().all(|split| manifest.samples(*split) > 0));
    for found in &theirs {
        assert_eq!(Some(found), ours.remove(&found["key"].as_u64().expect("a key")).as_ref());
    }
}

/// Of small pictures; `SAMPLES=1000000` tries many.
#[test]
fn an_exports_memory_does_not_depend_on_how_many_samples_there_are() {
    let samples: u32 = std::env::var("SAMPLES").map_or(20_000, |samples| samples.parse().expect("a number"));
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    let id: DatasetId = "many-1".parse().expect("an id");
    let pictures: Vec<Bytes> = (0..64).map(|seed| picture(seed, 32, 32)).collect();
    let shards = vec![[(Split::Train, 10_000)]; samples as usize / 10_000];
    let made = Dataset {
        dataset: &id,
        classes: 10,
        size: 32,
        shards: &shards.iter().map(<[_; 1]>::as_slice).collect::<Vec<_>>(),
        skipped: &|_, _| false,
        picture: &|key, _| pictures[key as usize % pictures.len()].clone(),
        moments: ([0.5; 3], [0.2; 3]),
    };
    dataset::write(&store, &made);
    let round = store.join(keys::round(&id, 1));
    std::fs::create_dir_all(round.parent().expect("a folder")).expect("writable");
    std::fs::write(round, "{}").expect("writable");
    for form in ["parquet", "webdataset"] {
        let mut command = Command::new(binary());
        command.args(["dataset", "export", "many", "--as", form, "--store"]).arg(&store);
        command.arg("--to").arg(folder.path().join(form)).stdout(Stdio::null());
        let (mut child, mut peak) = (command.spawn().expect("the binary"), 0.0);
        let status = loop {
            peak = process::peak_mb(child.id()).unwrap_or(peak);
            match child.try_wait().expect("a process") {
                Some(status) => break status,
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        println!("export of {samples} samples as {form}: peak_mb={peak:.0}");
        // Of which 190 are the program with libtorch in it.
        assert!(status.success() && (1.0..400.0).contains(&peak), "{form}: {peak} MB");
    }
}
