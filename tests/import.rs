//! Pictures that are there already, through real processes: folders, tars and Parquet files become a dataset.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proto::manifest::Skip;
use proto::{Manifest, Split, Stored};
use support::Cluster;
use support::dataset::picture;

const SMALL: [&str; 4] = ["--size", "64", "--min-bytes", "500"];
const WAIT: [&str; 3] = ["--wait", "--timeout", "120s"];

fn import(cluster: &Cluster, name: &str, path: &Path, more: &[&str]) -> Output {
    let path = path.display().to_string();
    cluster.try_gleaner(&[&["dataset", "import", name, &path], &SMALL[..], more].concat())
}

fn imported(cluster: &Cluster, name: &str, path: &Path, more: &[&str]) -> Manifest {
    let output = import(cluster, name, path, &[&WAIT, more].concat());
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
    let output = import(&cluster, "birds", &root, &WAIT);
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

/// A web server of the files below a folder, which gives parts of them, but of what is below `whole`; how many parts
/// workers have asked it for, which have a name, unlike the command. It takes its time for them.
fn serve(folder: PathBuf) -> (String, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = format!("http://{}", listener.local_addr().expect("it is bound"));
    let parts = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&parts);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (folder, counted) = (folder.clone(), Arc::clone(&counted));
            std::thread::spawn(move || while answer(&stream, &folder, &counted).is_some() {});
        }
    });
    (address, parts)
}

/// Answers one request; None: there is none any more.
fn answer(stream: &TcpStream, folder: &Path, parts: &AtomicU64) -> Option<()> {
    let mut head = Vec::new();
    for line in BufReader::new(stream).lines() {
        match line.ok()? {
            line if line.is_empty() => break,
            line => head.push(line.to_ascii_lowercase()),
        }
    }
    let path = head.first()?.split(' ').nth(1)?.to_owned();
    let range = head.iter().find_map(|line| line.strip_prefix("range: bytes=")?.split_once('-'));
    let range = range.filter(|_| !path.starts_with("/whole/"));
    let (status, bytes) = match (std::fs::read(folder.join(&path[1..])), range) {
        (Err(_), _) => ("404 Not Found".to_owned(), Vec::new()),
        (Ok(file), None) => ("200 OK".to_owned(), file),
        (Ok(file), Some((from, to))) => {
            let (from, to): (usize, usize) = (from.parse().ok()?, to.parse().ok()?);
            let to = to.min(file.len() - 1);
            if head.iter().any(|line| line.starts_with("user-agent:")) {
                parts.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
            let said = format!("206 Partial Content\r\nContent-Range: bytes {from}-{to}/{}", file.len());
            (said, file[from..=to].to_vec())
        }
    };
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", bytes.len());
    (&mut &*stream).write_all(&[head.as_bytes(), &bytes].concat()).ok()
}

/// The files below a folder that end so.
fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("readable").path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let mut found: Vec<PathBuf> = folders.iter().flat_map(|folder| self::files(folder, ending)).collect();
    found.extend(files.into_iter().filter(|file| file.extension().is_some_and(|is| is == ending)));
    found.sort();
    found
}

#[test]
fn tars_and_parquet_files_of_the_web_and_of_the_store_are_read_piece_by_piece() {
    let mut cluster = Cluster::start();
    let root = cluster.path("birds");
    birds(&root);
    cluster.start_worker_with("maker", &["--import-root", &root.display().to_string()]);
    let first = imported(&cluster, "birds", &root, &[]);
    let web = cluster.path("web");
    for form in ["tree", "webdataset", "parquet"] {
        let to = web.join(form).display().to_string();
        cluster.gleaner(&["dataset", "export", "birds", "--to", &to, "--as", form]);
    }
    cluster.terminate("maker");
    let (address, parts) = serve(web.clone());
    let published = |ending| -> Vec<String> {
        let below = |path: &PathBuf| path.strip_prefix(&web).expect("below it").display().to_string();
        files(&web, ending).iter().map(|path| format!("{address}/{}", below(path))).collect()
    };
    let start = |cluster: &Cluster, name: &str, from: &[&str], more: &[&str]| {
        let output = cluster.try_gleaner(&[&["dataset", "import", name], from, &SMALL[..], more].concat());
        assert!(output.status.success(), "{name}: {}", said(&output));
    };
    let same = |cluster: &Cluster, name: &str| {
        cluster.gleaner(&["dataset", "wait", name, "--timeout", "120s"]);
        let manifest = manifest(cluster, name);
        assert_eq!((outcomes(&manifest), samples(&manifest)), ([("kept", 20)].into(), samples(&first)), "{name}");
        let classes = |of: &Manifest| of.classes.iter().map(|class| class.synset.clone()).collect::<Vec<_>>();
        assert_eq!(classes(&manifest), classes(&first), "{name}");
    };

    // A tar's folder does not stand in its address as a split does in a tree: the file's own name says it.
    let tars = published("tar");
    for tar in files(&web, "tar") {
        let split = tar.parent().and_then(Path::file_name).expect("a folder").to_string_lossy().into_owned();
        std::fs::rename(&tar, web.join(format!("{split}-{}.tar", tar.file_stem().expect("a name").display())))
            .expect("the same disk");
    }
    assert!(!tars.is_empty() && published("tar").len() == tars.len());
    let tars = published("tar");
    let tars: Vec<&str> = tars.iter().map(String::as_str).collect();
    start(&cluster, "tars", &tars, &["--slice-urls", "4"]);
    // What a worker that is killed has committed is not asked for again.
    cluster.start_worker("killed");
    cluster.eventually("some pictures are there", |_| parts.load(Ordering::Relaxed) >= 6);
    cluster.kill("killed");
    cluster.start_worker("worker");
    same(&cluster, "tars");
    let asked = parts.load(Ordering::Relaxed);
    assert!((20..40).contains(&asked), "{asked} requests");
    cluster.gleaner(&[&["dataset", "refresh", "tars", "--import"], &tars[..], &["--wait"]].concat());
    assert_eq!(parts.load(Ordering::Relaxed), asked, "all of it was known");

    let rows = published("parquet");
    let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
    start(&cluster, "rows", &rows, &["--slice-urls", "5", "--keep-columns", "sha256"]);
    same(&cluster, "rows");

    let store = cluster.store().to_owned();
    let from_store = ["--store", &store];
    for form in ["tree", "parquet"] {
        let to = Path::new(&store).join("imports/birds").join(form);
        std::fs::create_dir_all(to.parent().expect("a folder")).expect("writable");
        std::fs::rename(web.join(form), &to).expect("the same disk");
        start(&cluster, &format!("stored-{form}"), &[&format!("store:imports/birds/{form}")], &from_store);
        same(&cluster, &format!("stored-{form}"));
    }
    let tar = files(&web, "tar").remove(0);
    let inside = Path::new(&store).join("imports/train-birds.tar");
    std::fs::copy(&tar, &inside).expect("writable");
    start(&cluster, "one", &["store:imports/train-birds.tar"], &[&from_store[..], &["--wait"]].concat());
    assert_eq!(samples(&manifest(&cluster, "one")), [4, 0, 0]);

    std::fs::create_dir(web.join("whole")).expect("writable");
    std::fs::rename(&tar, web.join("whole/birds.tar")).expect("the same disk");
    for (from, why) in [
        (format!("{address}/whole/birds.tar"), "its server gives no parts of files"),
        (format!("{address}/none.tar"), "404"),
        ("store:datasets/birds".to_owned(), "below store:imports/"),
        ("store:imports/none.tar".to_owned(), "no picture"),
    ] {
        let output = cluster.try_gleaner(&["dataset", "import", "none", &from, "--store", &store]);
        assert!(!output.status.success() && said(&output).contains(why), "{from}: {}", said(&output));
    }
    let output = cluster.try_gleaner(&["dataset", "import", "none", "store:imports/birds"]);
    assert!(output.status.code() == Some(2) && said(&output).contains("--store"), "{}", said(&output));
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
