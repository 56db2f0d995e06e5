//! Pictures that are there already, through real processes: folders, tars and Parquet files become a dataset.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Output;

use proto::manifest::Skip;
use proto::{Manifest, Split, Stored};
use support::Cluster;
use support::dataset::picture;

const SMALL: [&str; 6] = ["--size", "64", "--min-bytes", "500", "--timeout", "120s"];

fn import(cluster: &Cluster, name: &str, path: &Path, more: &[&str]) -> Output {
    let path = path.display().to_string();
    cluster.try_gleaner(&[&["dataset", "import", name, &path], &SMALL[..], more].concat())
}

fn imported(cluster: &Cluster, name: &str, path: &Path, more: &[&str]) -> Manifest {
    let output = import(cluster, name, path, &[&["--wait"], more].concat());
    assert!(output.status.success(), "{name}: {}", said(&output));
    manifest(cluster, name)
}

fn manifest(cluster: &Cluster, name: &str) -> Manifest {
    Manifest::from_json(cluster.gleaner(&["dataset", "manifest", name]).as_bytes()).expect("a manifest")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

fn outcomes(manifest: &Manifest) -> BTreeMap<&'static str, u64> {
    manifest.outcomes.iter().map(|(outcome, n)| (proto::rejection::outcome_name(outcome), n)).collect()
}

fn samples(manifest: &Manifest) -> [u64; 3] {
    Split::ALL.map(|split| manifest.samples(split))
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("writable");
    std::fs::write(path, bytes).expect("writable");
}

/// Two classes of good pictures in three splits, and one of each kind of others.
fn birds(root: &Path) {
    for (split, pictures) in [("train", 6), ("val", 2), ("test", 2)] {
        for n in 0..pictures {
            for (class, name) in ["wren", "golden eagle"].into_iter().enumerate() {
                let seed = pictures * 100 + n * 2 + class as u64 + u64::from(split == "test") * 50;
                write(&root.join(split).join(name).join(format!("{n}.jpg")), &picture(seed, 96, 80));
            }
        }
    }
    let of = |file: &str| std::fs::read(root.join(file)).expect("it is there");
    write(&root.join("train/wren/again.jpg"), &of("val/wren/0.jpg"));
    write(&root.join("train/wren/cut.jpg"), &of("train/wren/0.jpg")[..1500]);
    write(&root.join("train/wren/small.jpg"), &picture(7, 60, 60));
    write(&root.join("train/wren/notes.txt"), b"no picture, but a file");
    write(&root.join("LICENSE"), b"of no class");
    std::os::unix::fs::symlink(root.join("test"), root.join("train/eagles")).expect("writable");
}

#[test]
fn a_folder_becomes_a_dataset_with_one_outcome_for_each_file_and_its_own_splits() {
    let mut cluster = Cluster::start();
    let root = cluster.path("birds & more");
    birds(&root);
    cluster.start_worker_with("worker", &["--import-root", &root.display().to_string()]);

    let dry = said(&import(&cluster, "birds", &root, &["--dry-run"]));
    assert!(dry.contains("nothing was created") && dry.contains("golden eagle"), "{dry}");
    let output = import(&cluster, "birds", &root, &["--wait"]);
    assert!(output.status.success(), "{}", said(&output));
    for note in ["its folders are splits", "1 files have no class", "1 links are passed over"] {
        assert!(said(&output).contains(note), "{note}: {}", said(&output));
    }
    let first = manifest(&cluster, "birds");
    assert_eq!(outcomes(&first), [("kept", 21), ("too_few_pixels", 1), ("too_small", 1), ("truncated", 1)].into());
    // The one that stands in validation, too, is not trained on.
    assert_eq!((samples(&first), first.skipped[&Skip::Duplicate]), ([12, 4, 4], 1));
    let classes: Vec<&str> = first.classes.iter().map(|class| class.synset.as_str()).collect();
    assert_eq!(classes, ["golden eagle", "wren"]);

    write(&root.join("test/wren/new.jpg"), &picture(999, 96, 80));
    let path = root.display().to_string();
    cluster.gleaner(&["dataset", "refresh", "birds", "--import", &path, "--wait"]);
    let second = manifest(&cluster, "birds");
    assert_eq!((second.rounds, samples(&second)), (2, [12, 4, 5]));

    // By their bytes instead, from tars.
    let tars = cluster.path("tars");
    cluster.gleaner(&["dataset", "export", "birds", "--to", &tars.display().to_string(), "--as", "webdataset"]);
    let refused = import(&cluster, "elsewhere", &tars, &["--wait"]);
    let blocked = cluster.gleaner(&["dataset", "outcomes", "elsewhere", "--outcome", "blocked_address"]);
    assert_eq!(blocked.lines().filter(|line| line.contains("blocked_address")).count(), 21, "{}", said(&refused));
    std::fs::rename(&tars, root.join("tars")).expect("the same disk");
    let again = imported(&cluster, "again", &root.join("tars"), &["--splits", "content", "--keep-columns", "sha256"]);
    let classes = |manifest: &Manifest| {
        manifest.classes.iter().map(|class| (class.synset.clone(), class.total())).collect::<Vec<_>>()
    };
    assert_eq!(classes(&again), classes(&second));
    assert_eq!(samples(&again).iter().sum::<u64>(), 21);
    let kept = imported(&cluster, "kept", &root.join("tars"), &[]);
    assert_eq!(samples(&kept), samples(&second), "their folders say the splits");

    let rows = root.join("rows");
    cluster.gleaner(&["dataset", "export", "birds", "--to", &rows.display().to_string(), "--as", "parquet"]);
    for (split, files) in Split::ALL.into_iter().zip([1, 1, 2]) {
        let named = |n| format!("{split}-{n:05}-of-{files:05}.parquet");
        assert!((0..files).all(|n| rows.join(named(n)).is_file()), "{split}");
    }
    // Slices of few rows: what stands together is read together, whoever reads it.
    let back = imported(&cluster, "back", &rows, &["--slice-urls", "5", "--keep-columns", "list_url,sha256"]);
    assert_eq!((samples(&back), classes(&back)), (samples(&second), classes(&second)));
    assert_eq!(outcomes(&back), [("kept", 21)].into());
}

#[test]
fn what_is_imported_is_trained_on() {
    let mut cluster = Cluster::start();
    let root = cluster.path("birds");
    birds(&root);
    cluster.start_worker_with("worker", &["--import-root", &root.display().to_string()]);
    let manifest = imported(&cluster, "birds", &root, &[]);
    assert_eq!(samples(&manifest), [12, 4, 4]);
    cluster.start_trainer("agent", 1);
    let spec = r#"
dataset = "birds"
seed = 3
model = { arch = "alexnet-slim", width = 0.25 }
input = { crop = 64 }
train = { epochs = 3, batch = 4, learning_rate = 0.01 }
ranks = { min = 1, max = 1, lanes = 1, threads = 1 }
"#;
    let spec = cluster.write("run.toml", spec);
    cluster.gleaner(&["run", "submit", "-f", &spec, "--name", "flight", "--wait", "--timeout", "180s"]);
    // Three epochs of twelve pictures in batches of four.
    let run = cluster.json(&["run", "describe", "flight"]);
    assert_eq!((run["step"].as_u64(), run["steps_per_epoch"].as_u64()), (Some(9), Some(3)), "{run}");
    let evaluated = cluster.gleaner(&["run", "evaluate", "flight", "--split", "test"]);
    assert!(evaluated.contains("golden eagle"), "{evaluated}");
}

#[test]
fn a_list_leads_to_no_file_unless_the_dataset_is_one_of_files() {
    let mut cluster = Cluster::start();
    let root = cluster.path("pictures");
    write(&root.join("wren/1.jpg"), &picture(1, 96, 80));
    cluster.start_worker_with("worker", &["--import-root", &root.display().to_string()]);
    let list = cluster.write("list.csv", &format!("url,label\nfile://{}/wren/1.jpg,wren\n", root.display()));
    cluster.try_gleaner(&["dataset", "create", "list", "--urls", &list, "--wait", "--timeout", "120s"]);
    let outcomes = cluster.gleaner(&["dataset", "outcomes", "list"]);
    assert!(outcomes.contains("bad_url") && !outcomes.contains("kept"), "{outcomes}");
}
