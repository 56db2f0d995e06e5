//! The pages in a real browser: they load without a complaint, suit a phone and a keyboard, and a network sees there
//! what it sees elsewhere.

mod answers;
mod small;

use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;

use answers::{compare, logits, onnxruntime};
use demo_origin::origin::{Options, Origin};
use serde_json::{Value, json};
use small::{dataset, submit, wait};
use support::{Cluster, FreeAddress, root};

/// Chromium, by `CHROMIUM` or on the path. Who has none does without these tests.
fn chromium() -> Option<PathBuf> {
    let named = std::env::var_os("CHROMIUM").map(PathBuf::from);
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let found = std::env::split_paths(&folders).flat_map(|folder| names.map(|name| folder.join(name)));
    let browser = named.or_else(|| found.into_iter().find(|file| file.is_file()));
    if browser.is_none() {
        eprintln!("left out: no Chromium is installed");
    }
    browser
}

/// What browser.py saw.
fn browse(cluster: &Cluster, chromium: &PathBuf, job: &Value) -> Value {
    let python = root().join("target/tools/pytorch");
    let axe = Command::new(python.join("bin/python"))
        .args([
            "-c",
            "import axe_playwright_python, pathlib; print(pathlib.Path(axe_playwright_python.__file__).parent)",
        ])
        .output();
    let axe = String::from_utf8(axe.expect("make pytorch").stdout).expect("a path");
    let job = cluster.write("job.json", &job.to_string());
    let output = Command::new(python.join("bin/python"))
        .arg(root().join("tests/python/browser.py"))
        .arg(chromium)
        .args([&format!("{}/axe.min.js", axe.trim()), &job])
        .output()
        .expect("make pytorch");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// How many pictures the page with the network in 8 bits is given.
const FEWER: usize = 40;

/// Makes 240 pictures that no run has seen, stored as those of `small` are, and names their folders, one for each class.
fn unseen(cluster: &Cluster) -> Vec<String> {
    let origin = Origin::serve(Options { seed: 12, ..Options::default() }).expect("loopback");
    let urls = cluster.write("unseen.txt", &small::list_of(1000..1240, &origin));
    let splits = ["--validation", "0", "--test", "0", "--size", "72"];
    let wait = ["--wait", "--timeout", "120s"];
    cluster.gleaner(&[&["dataset", "create", "unseen", "--urls", &urls], &splits[..], &wait].concat());
    let tree = cluster.path("tree").display().to_string();
    cluster.gleaner(&["dataset", "export", "unseen", "--to", &tree, "--as", "tree"]);
    let classes = std::fs::read_dir(format!("{tree}/train")).expect("a folder");
    classes.map(|class| class.expect("a folder").path().display().to_string()).collect()
}

#[test]
fn a_browser_shows_every_page_and_sees_in_pictures_what_classify_sees() {
    let Some(chromium) = chromium() else { return };
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    cluster.start_trainer("trainer", 1);
    // Steps are reported four times a second: the first run lasts long enough for lines.
    for (name, rate, epochs) in [("one", "0.02", 24), ("two", "0.01", 4)] {
        submit(&cluster, name, epochs, &["ranks.max=1", &format!("train.learning_rate={rate}")]);
        wait(&cluster, name);
    }
    let serve = |cluster: &mut Cluster, what: &str, command: &[&str]| {
        let address = FreeAddress::loopback();
        let mut command: Vec<String> = command.iter().map(|&word| word.to_owned()).collect();
        command.iter_mut().filter(|word| *word == "ADDRESS").for_each(|word| *word = address.to_string());
        cluster.spawn(what, &command.iter().map(String::as_str).collect::<Vec<_>>());
        cluster.eventually("it is served", |_| TcpStream::connect(address.to_string()).is_ok());
        address
    };
    let coordinator = format!("http://{}", cluster.address());
    let pages = serve(&mut cluster, "web", &["web", "--web-listen", "ADDRESS", "--coordinator", &coordinator]);
    // The page as a folder, with the network in 8 bits, by any web server.
    let folder = cluster.path("page").display().to_string();
    cluster.gleaner(&[
        "run",
        "model",
        "one",
        "--to",
        &folder,
        "--format",
        "page",
        "--format",
        "onnx",
        "--format",
        "onnx-int8",
    ]);

    let unseen = unseen(&cluster);
    let classify = |model: &str| -> Vec<Value> {
        let folders = unseen.iter().map(String::as_str);
        let answers = cluster.json(&["classify", model].into_iter().chain(folders).collect::<Vec<_>>());
        answers.as_array().expect("a list").iter().take(200).cloned().collect()
    };
    let [onnx, int8] = ["model.onnx", "model-int8.onnx"].map(|file| format!("{folder}/{file}"));
    let classified = [classify("one"), classify(&int8)];
    assert_eq!(classified[0].len(), 200);
    let pictures: Vec<&Value> = classified[0].iter().map(|answer| &answer["picture"]).collect();

    let page = |path: &str| format!("http://{pages}{path}");
    let pages = ["/", "/datasets/small", "/datasets/small/urls?outcome=kept", "/runs/one", "/runs/one/logs"].map(page);
    let more = ["/compare?a=one&b=two", "/runs/one/mistakes"].map(page);
    let pages = [&pages[..], &more].concat();
    let shots = std::env::var("SHOTS").ok();
    let job = json!({
        "pages": pages,
        "ask": [
            {"place": page("/runs/one/try"), "pictures": pictures},
            {"place": folder, "pictures": pictures[..FEWER]},
        ],
        "shots": shots,
    });
    let seen = browse(&cluster, &chromium, &job);
    for seen in seen["pages"].as_array().expect("pages") {
        assert_eq!((&seen["console"], &seen["serious"]), (&json!([]), &json!([])), "{seen}");
        assert!(seen["wider"] == 0 && seen["focused"] == "skip", "{seen}");
        let bytes = seen["bytes"].as_u64().expect("a count");
        assert!((1000..400_000).contains(&bytes), "{seen}");
    }
    let run = &seen["pages"][3];
    assert_eq!(run["title"], "one - Gleaner");
    // Each chart has a line: the loss has one for training step by step, and one each for the epochs and both splits.
    assert_eq!(run["charts"], json!([3, 2, 1, 1]), "{run}");

    // The network's mistakes are those that `run evaluate` finds, each with its picture.
    let (evaluated, mistakes) = (cluster.json(&["run", "evaluate", "one"]), &seen["pages"][6]);
    let [right, all] = ["top1", "pictures"].map(|count| evaluated[count].as_u64().expect("a count"));
    let verdict = mistakes["verdict"].as_str().expect("a sentence");
    assert!(verdict.starts_with(&format!("Right at once in {right} of {all} pictures of the test split")), "{verdict}");
    assert_eq!(mistakes["pictures"], all - right, "{mistakes}");

    for (asked, classified) in seen["ask"].as_array().expect("pages").iter().zip(&classified) {
        assert_eq!((&asked["console"], &asked["wider"]), (&json!([]), &json!(0)), "{asked}");
        let answers = asked["answers"].as_array().expect("answers");
        let is_named = |(answer, classified): &(&Value, &Value)| {
            let guess = &classified["guesses"][0];
            let name = guess["name"].as_str().filter(|name| !name.is_empty()).or(guess["synset"].as_str());
            answer["first"].as_str().expect("a line").starts_with(name.expect("a name"))
        };
        let named = answers.iter().zip(classified).filter(is_named).count();
        // One may be as near to another class.
        assert!(named + 1 >= answers.len(), "{answers:?} {classified:?}");
    }
    let [ours, ours_int8] = classified.each_ref().map(|answers| logits(answers));
    let [browser, browser_int8] = [0, 1].map(|page| logits(seen["ask"][page]["answers"].as_array().expect("answers")));
    let theirs = onnxruntime(&cluster, &onnx, &classified[0]);
    let millis = |answers: &Value| {
        let answers = answers["answers"].as_array().expect("answers");
        answers.iter().map(|answer| answer["millis"].as_f64().expect("a number")).sum::<f64>() / answers.len() as f64
    };
    let [in_f32, in_int8] = [0, 1].map(|page| millis(&seen["ask"][page]));
    let (ours, (smaller, _)) = ([compare(&ours, &theirs), compare(&browser, &theirs)], compare(&ours_int8, &ours));
    println!(
        "SEEN: pictures=200 classify_as_onnxruntime={} browser_as_onnxruntime={} difference={:.1e} \
         browser_difference={:.1e} int8_as_f32={smaller} browser_ms={in_f32:.1} browser_int8_ms={in_int8:.1}",
        ours[0].0, ours[1].0, ours[0].1, ours[1].1
    );
    // In 8 bits a value may be rounded to either side.
    let in_int8 = compare(&browser_int8, &ours_int8[..FEWER]);
    assert!(in_int8.0 + 1 >= FEWER && in_int8.1 < 0.05, "{in_int8:?}");
    assert!(ours.iter().all(|&(alike, difference)| alike == 200 && difference < 1e-4), "{ours:?}");
    assert!(seen["ask"][0]["status"].as_str().is_some_and(|status| status.starts_with("5 classes")), "{seen}");
}
