//! The pages in a real browser: they load without a complaint, suit a phone and a keyboard, and a network sees there
//! what it sees elsewhere.

mod small;

use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;

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
    cluster.gleaner(&["run", "model", "one", "--to", &folder, "--format", "page", "--format", "onnx-int8"]);

    let tree = cluster.path("tree").display().to_string();
    cluster.gleaner(&["dataset", "export", "small", "--to", &tree, "--as", "tree"]);
    let class = cluster.json(&["dataset", "describe", "small"])["classes"][1]["synset"].clone();
    let of = format!("{tree}/test/{}", class.as_str().expect("a synset"));
    let classified = cluster.json(&["classify", "one", &of]);
    let classified = classified.as_array().expect("a list");
    assert!(classified.len() > 2, "{classified:?}");
    let pictures: Vec<&Value> = classified.iter().map(|answer| &answer["picture"]).collect();

    let page = |path: &str| format!("http://{pages}{path}");
    let pages = ["/", "/datasets/small", "/datasets/small/urls?outcome=kept", "/runs/one", "/runs/one/logs"].map(page);
    let more = ["/compare?a=one&b=two", "/runs/one/mistakes"].map(page);
    let pages = [&pages[..], &more].concat();
    let shots = std::env::var("SHOTS").ok();
    let job = json!({
        "pages": pages,
        "ask": [page("/runs/one/try"), folder],
        "pictures": pictures,
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

    let int8 = cluster.json(&["classify", &format!("{folder}/model-int8.onnx"), &of]);
    let numbers = |of: &Value| -> Vec<f64> {
        of.as_array().expect("logits").iter().map(|logit| logit.as_f64().expect("a number")).collect()
    };
    for (asked, expected) in [(&seen["ask"][0], classified), (&seen["ask"][1], int8.as_array().expect("a list"))] {
        assert_eq!((&asked["console"], &asked["wider"]), (&json!([]), &json!(0)), "{asked}");
        let answers = asked["answers"].as_array().expect("answers");
        assert_eq!(answers.len(), expected.len());
        for (answer, expected) in answers.iter().zip(expected) {
            let (ours, theirs) = (numbers(&answer["logits"]), numbers(&expected["logits"]));
            let most = theirs.iter().fold(0.0_f64, |most, logit| most.max(logit.abs()));
            let difference = ours.iter().zip(&theirs).fold(0.0_f64, |most, (a, b)| most.max((a - b).abs()));
            assert!(ours.len() == 5 && difference < 1e-4 * most, "{answer} {expected}");
            let name = expected["guesses"][0]["name"].as_str().filter(|name| !name.is_empty());
            let name = name.or(expected["guesses"][0]["synset"].as_str()).expect("a name");
            assert!(answer["first"].as_str().is_some_and(|first| first.starts_with(name)), "{answer} {expected}");
        }
    }
    assert!(seen["ask"][0]["status"].as_str().is_some_and(|status| status.starts_with("5 classes")), "{seen}");
}
