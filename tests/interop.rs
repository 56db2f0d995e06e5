//! Formats and numbers against independent implementations: Python's webdataset and Pillow, PyTorch, a real S3 server.

mod answers;
mod seaweed;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use answers::{compare, logits, onnxruntime};
use bytes::Bytes;
use demo_origin::list;
use demo_origin::origin::{Options, Origin};
use demo_origin::rot::Rot;
use proto::{Manifest, RunSpec, Stored, shard};
use safetensors::{Dtype, tensor::TensorView};
use seaweed::SeaweedFs;
use support::{Cluster, python, root, s3_environment};

fn printed(command: &mut Command) -> String {
    let output = command.output().expect("it can be started");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// A dataset of a few dozen pictures, made by one worker.
fn dataset(cluster: &Cluster) -> Manifest {
    let origin = Origin::serve(Options { seed: 9, ..Options::default() }).expect("loopback");
    let good = (0..60).map(|n| list::url(Rot::Good, (n as usize % 3, n), n, &origin));
    let list: String = good.enumerate().map(|(n, url)| format!("n{}\t{url}\n", n % 3)).collect();
    let list = cluster.write("urls.txt", &list);
    let args =
        ["--size", "72", "--slice-urls", "20", "--validation", "0.2", "--test", "0.2", "--wait", "--timeout", "120s"];
    cluster.gleaner(&[&["dataset", "create", "small", "--urls", &list], &args[..]].concat());
    Manifest::from_json(cluster.gleaner(&["dataset", "manifest", "small"]).as_bytes()).expect("a manifest")
}

#[test]
fn webdataset_reads_the_same_pixels_and_labels_as_we_do() {
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    let manifest = dataset(&cluster);
    let tars: Vec<PathBuf> = manifest
        .shards
        .iter()
        .flat_map(|shard| shard.tars.values())
        .map(|tar| Path::new(cluster.store()).join(&tar.key))
        .collect();
    let mut ours = BTreeMap::new();
    for (tar, blocks) in tars.iter().zip(manifest.shards.iter().flat_map(|shard| shard.tars.values())) {
        let bytes = Bytes::from(std::fs::read(tar).expect("a tar"));
        assert_eq!(shard::sha256_hex(&bytes), blocks.sha256);
        for block in &blocks.blocks {
            let range = block.offset as usize..(block.offset + block.length) as usize;
            for sample in shard::read_block(&bytes.slice(range)).expect("a block") {
                let image = turbojpeg::decompress(&sample.image, turbojpeg::PixelFormat::RGB).expect("a JPEG");
                let pixels = shard::sha256_hex(&image.pixels);
                ours.insert(sample.key, format!("{} {pixels} {} {}", sample.label, image.width, image.height));
            }
        }
    }
    assert_eq!(ours.len(), 60);
    let theirs = printed(python("python").arg(root().join("tests/python/read_shards.py")).args(&tars));
    let theirs: BTreeMap<u64, String> = theirs
        .lines()
        .map(|line| line.split_once(' ').expect("a key and the rest"))
        .map(|(key, rest)| (key.parse().expect("a key"), rest.to_owned()))
        .collect();
    assert_eq!(theirs, ours);
}

#[test]
fn webdataset_reads_the_captions_and_columns_of_a_list_without_classes() {
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    let origin = Origin::serve(Options { seed: 9, ..Options::default() }).expect("loopback");
    // LAION's columns, as JSON lines have them.
    let row = |n: u64| {
        let url = list::url(Rot::Good, (0, n), n, &origin);
        let (text, similarity) = (format!("a \"dog\", été {n}"), 0.25 + n as f64 / 64.0);
        let rest =
            serde_json::json!({ "WIDTH": 9_000 + n, "similarity": similarity, "hash": n << 40, "punsafe": null });
        (serde_json::json!({ "URL": url, "TEXT": text, "pwatermark": [0.5] }), rest)
    };
    let rows: Vec<serde_json::Value> = (0..12)
        .map(row)
        .map(|(mut row, rest)| {
            let more = rest.as_object().expect("an object").clone();
            row.as_object_mut().expect("an object").extend(more);
            row
        })
        .collect();
    let list: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let list = cluster.write("laion.jsonl", &list);
    let flags = ["--unlabelled", "--keep-columns", "all", "--size", "64", "--wait", "--timeout", "120s"];
    cluster.gleaner(&[&["dataset", "create", "laion", "--urls", &list], &flags[..]].concat());
    let manifest = Manifest::from_json(cluster.gleaner(&["dataset", "manifest", "laion"]).as_bytes()).expect("one");
    let tars = manifest.shards.iter().flat_map(|shard| shard.tars.values());
    let tars: Vec<PathBuf> = tars.map(|tar| Path::new(cluster.store()).join(&tar.key)).collect();
    let read = printed(python("python").arg(root().join("tests/python/read_columns.py")).args(&tars));
    let mut read: Vec<serde_json::Value> = read.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    read.sort_by_key(|sample| sample["key"].as_u64());
    assert_eq!(read.len(), rows.len());
    for (sample, row) in read.iter().zip(&rows) {
        assert_eq!((&sample["cls"], &sample["txt"]), (&serde_json::Value::Null, &row["TEXT"]));
        for (ours, listed) in [
            ("url", "URL"),
            ("TEXT", "TEXT"),
            ("WIDTH", "WIDTH"),
            ("similarity", "similarity"),
            ("hash", "hash"),
            ("pwatermark", "pwatermark"),
        ] {
            assert_eq!(sample["json"][ours], row[listed], "{ours}");
        }
        assert!(sample["json"]["width"].as_u64().is_some_and(|width| width < 9_000), "as fetched, not as listed");
    }
}

/// Eight images of noise with their labels, as safetensors.
#[test]
fn classify_sees_what_onnxruntime_sees_and_is_as_right_as_the_runs_own_test() {
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    let classes = dataset(&cluster).classes;
    cluster.start_trainer("trainer", 1);
    let runs = [("bn", "alexnet-bn"), ("slim", "alexnet-slim"), ("paper", "alexnet-2012")];
    for (run, arch) in runs {
        let model = format!("model = {{ arch = \"{arch}\", width = 0.25 }}\ninput = {{ crop = 64 }}\n");
        let train =
            "train = { epochs = 6, batch = 16, learning_rate = 0.02 }\nranks = { max = 1, lanes = 2, threads = 1 }\n";
        let spec = cluster.write("run.toml", &format!("dataset = \"small\"\n{model}{train}"));
        cluster.gleaner(&["run", "submit", "-f", &spec, "--name", run, "--wait", "--timeout", "180s"]);
    }
    let tree = cluster.path("tree").display().to_string();
    cluster.gleaner(&["dataset", "export", "small", "--to", &tree, "--as", "tree"]);
    for (run, _) in runs {
        let folder = cluster.path(run).display().to_string();
        cluster.gleaner(&["run", "model", run, "--to", &folder, "--format", "onnx", "--format", "onnx-int8"]);
        let int8 = format!("{folder}/model-int8.onnx");
        let bytes = |file: &str| std::fs::metadata(file).expect("it was written").len() as f64;
        assert!(bytes(&int8) < 0.3 * bytes(&format!("{folder}/model.onnx")), "{run}: {} bytes", bytes(&int8));
        let (mut right, mut pictures) = (0, 0);
        for class in &classes {
            let of = format!("{tree}/test/{}", class.synset);
            if !Path::new(&of).exists() {
                continue;
            }
            let found = cluster.json(&["classify", run, &of]);
            // A model on this machine is the same one.
            assert_eq!(cluster.json(&["classify", &folder, &of])[0]["logits"], found[0]["logits"]);
            let found = found.as_array().expect("a list");
            for answer in found {
                right += u64::from(answer["guesses"][0]["synset"] == class.synset.as_str());
                pictures += 1;
            }
            let exactly = format!("{folder}/model.onnx");
            let (alike, exact) = compare(&logits(found), &onnxruntime(&cluster, &exactly, found));
            assert!(alike == found.len() && exact < 1e-4, "{run} {}: {alike}, {exact}", class.synset);
            // In 8 bits a value may be rounded to either side; what differs by more has other scales.
            let found = cluster.json(&["classify", &int8, &of]);
            let found = found.as_array().expect("a list");
            let [(_, rounded), (_, coarse)] =
                [&int8, &exactly].map(|model| compare(&logits(found), &onnxruntime(&cluster, model, found)));
            assert!(rounded < 0.05 && coarse < 0.25, "{run} {}: {rounded} {coarse}", class.synset);
        }
        let test = cluster.json(&["run", "describe", run])["test"].clone();
        assert_eq!(test["samples"].as_u64(), Some(pictures), "{test}");
        let top1 = test["top1"].as_f64().expect("a share");
        assert!((top1 - right as f64 / pictures as f64).abs() < 1e-6, "{run}: {right} of {pictures}, {test}");
        let csv = cluster.path("taken-for.csv").display().to_string();
        let evaluated = cluster.json(&["run", "evaluate", run, "--csv", &csv]);
        assert_eq!((&evaluated["top1"], &evaluated["pictures"]), (&right.into(), &pictures.into()), "{evaluated}");
        assert_eq!(std::fs::read_to_string(csv).expect("it was written").lines().count(), 4, "a class a row");
        let smaller =
            cluster.json(&["run", "evaluate", &int8, "--dataset", "small"])["top1"].as_u64().expect("a count");
        assert!(smaller.abs_diff(right) <= 2, "{run}: {right} of {pictures} in f32, {smaller} in 8 bits");
        let named = cluster.gleaner(&["run", "evaluate", &folder, "--dataset", "small", "--split", "train"]);
        assert!(named.contains("train split"), "{named}");
        assert_eq!(cluster.try_gleaner(&["run", "evaluate", &folder]).status.code(), Some(2), "of which dataset?");
    }
    let curves = cluster.path("curves").display().to_string();
    cluster.gleaner(&["run", "export", "bn", "slim", "--tensorboard", &curves]);
    let read = printed(python("python").arg(root().join("tests/python/tensorboard_curves.py")).arg(&curves));
    let read: serde_json::Value = serde_json::from_str(&read).expect("JSON");
    for run in ["bn", "slim"] {
        let points = cluster.json(&["run", "metrics", run, "--kind", "validation"]);
        let points = points.as_array().expect("points");
        let theirs = read[format!("{run}/validation/loss")].as_array().expect("a curve");
        assert!(points.len() == 6 && theirs.len() == points.len(), "{run}: {read}");
        for (ours, theirs) in points.iter().zip(theirs) {
            let difference = ours["loss"].as_f64().expect("a number") - theirs[1].as_f64().expect("a number");
            assert!(ours["step"] == theirs[0] && difference.abs() < 1e-6, "{ours} {theirs}");
        }
        assert!(read[format!("{run}/step/learning_rate")].as_array().is_some_and(|curve| !curve.is_empty()), "{read}");
    }
    let refused = cluster.try_gleaner(&["classify", "slim", "no-such-file.jpg"]);
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(cluster.try_gleaner(&["classify", "none", "x.jpg"]).status.code(), Some(3), "there is no such run");
}

fn a_batch() -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(1);
    let mut noise = || random.f32() * 4.0 - 2.0;
    let images: Vec<u8> = (0..8 * 3 * 224 * 224).flat_map(|_| noise().to_le_bytes()).collect();
    let labels: Vec<u8> = [0_i64, 1, 2, 3, 4, 0, 1, 2].iter().flat_map(|label| label.to_le_bytes()).collect();
    let images = TensorView::new(Dtype::F32, vec![8, 3, 224, 224], &images).expect("as many bytes");
    let labels = TensorView::new(Dtype::I64, vec![8], &labels).expect("as many bytes");
    safetensors::serialize([("images", images), ("labels", labels)], None).expect("plain tensors")
}

#[test]
fn one_step_of_each_network_is_pytorch_s() {
    for (arch, precision, tolerance) in [
        ("alexnet", "f64", 1e-9),
        ("alexnet-bn", "f64", 1e-9),
        ("alexnet-2012", "f64", 1e-9),
        ("alexnet-slim", "f32", 2e-4),
    ] {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let [batch, step] = ["batch", "step"].map(|name| dir.path().join(name).with_extension("safetensors"));
        std::fs::write(&batch, a_batch()).expect("a folder to write to");
        let spec = RunSpec::from_toml(&format!(
            "dataset = \"d\"
            model = {{ arch = \"{arch}\", width = 0.125, dropout = 0.0 }}
            train = {{ batch = 8, learning_rate = 0.1, momentum = 0.9, weight_decay = 0.01, label_smoothing = 0.1 }}
            ranks = {{ max = 1, lanes = 1, precision = \"{precision}\" }}"
        ))
        .expect("a sound spec");
        trainer::reference_step(&spec, 5, &batch, &step).expect("a sound batch");
        let script = root().join("tests/python/alexnet_step.py");
        let numbers = ["0.1", "0.9", "0.01", "0.1"];
        let differences = printed(python("python").arg(script).args([&batch, &step]).arg(arch).args(numbers));
        for difference in differences.split_whitespace() {
            let difference: f64 = difference.parse().expect("a number");
            assert!(difference < tolerance, "{arch} {precision}: logits, loss, gradients, steps: {differences}");
        }
    }
}

#[test]
fn a_run_begins_with_the_state_dict_of_torchvisions_network() {
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    dataset(&cluster);
    cluster.start_trainer("trainer", 1);
    let weights = cluster.path("alexnet.pth").display().to_string();
    let script = root().join("tests/python/alexnet_weights.py");
    let sums = printed(python("python").arg(script).args([&weights, "64"]));
    let sets = [
        "model.arch=alexnet",
        "model.width=0.125",
        "input.crop=64",
        "train.epochs=1",
        "train.batch=16",
        "train.freeze=[\"features\", \"classifier.1\"]",
        "train.head_factor=10",
    ];
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let submit =
        ["run", "submit", "--dataset", "small", "--name", "tuned", "--from", &weights, "--wait", "--timeout", "120s"];
    cluster.gleaner(&submit.into_iter().chain(sets).collect::<Vec<_>>());
    let folder = cluster.path("tuned");
    cluster.gleaner(&["run", "model", "tuned", "--to", &folder.display().to_string()]);
    let bytes = std::fs::read(folder.join("model.safetensors")).expect("it was fetched");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let sum = |name: &str| -> f64 {
        let data = tensors.tensor(name).expect("torchvision's name").data().as_chunks::<4>().0.to_vec();
        data.into_iter().map(|bytes| f64::from(f32::from_le_bytes(bytes))).sum()
    };
    let mut taken = 0;
    for (name, expected) in sums.lines().filter_map(|line| line.split_once(' ')) {
        let expected: f64 = expected.parse().expect("a number");
        let is_same = (sum(name) - expected).abs() < 1e-9 * expected.abs().max(1.0);
        let is_frozen = name.starts_with("features.") || name.starts_with("classifier.1.");
        assert_eq!(is_same, is_frozen, "{name}: {} of {expected}", sum(name));
        taken += u32::from(is_same);
    }
    assert_eq!(taken, 12, "six layers of a weight and a bias");
    assert_eq!(tensors.tensor("classifier.6.bias").expect("the last layer").shape(), [3]);
    let damaged = cluster.write("damaged.pth", "PK\u{3}\u{4}");
    let refused = cluster.try_gleaner(&["run", "submit", "--dataset", "small", "--from", &damaged]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && said.contains("is it all there?"), "{said}");
    let events = cluster.json(&["run", "describe", "tuned"])["events"].to_string();
    assert!(events.contains("the weights of the file alexnet.pth; the last layer is new"), "{events}");
}

#[test]
fn what_torch_saves_becomes_safetensors_of_the_same_bits_or_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let script = root().join("tests/python/state_dicts.py");
    printed(python("python").arg(&script).arg("write").arg(dir.path()));
    let files = |folder: PathBuf| {
        let all = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("a file").path());
        all.filter(|path| path.extension().is_some_and(|ending| ending == "pth"))
    };
    for path in files(dir.path().to_owned()) {
        let converted = state_dict::convert(&std::fs::read(&path).expect("a file"));
        let converted = converted.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let is_normed =
            !["parameters", "views", "views_legacy"].iter().any(|name| path.ends_with(format!("{name}.pth")));
        let counts: &[&str] = if is_normed { &["norm.num_batches_tracked"] } else { &[] };
        assert_eq!(converted.left_out, counts, "{}", path.display());
        let head = safetensors::SafeTensors::deserialize(&converted.safetensors);
        assert!(head.is_ok(), "{}: {head:?}", path.display());
        std::fs::write(path.with_extension("safetensors"), converted.safetensors).expect("a folder to write to");
    }
    let checked = printed(python("python").arg(&script).arg("check").arg(dir.path()));
    assert_eq!(checked.lines().count(), 10, "{checked}");
    for path in files(dir.path().join("refused")) {
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let said = state_dict::convert(&std::fs::read(&path).expect("a file")).expect_err(&name).to_string();
        let reason = match &*name {
            "network" => "\"torch.nn.modules.container.Sequential\", which no state dict needs",
            "tensor" => "single tensor",
            "protocol" => "pickle_protocol 4",
            "sparse" => "torch._utils._rebuild_sparse_tensor",
            _ => "TorchScript",
        };
        assert!(said.contains(reason), "{name}: {said}");
    }
}

#[test]
fn the_whole_job_runs_on_a_real_s3_server() {
    let s3 = SeaweedFs::start(&[("K", "S", &["Admin", "Read", "Write", "List", "Tagging"])]);
    let mut cluster = Cluster::new(Some("s3://gleaner/cluster"), s3_environment(s3.s3));
    s3.make_bucket("gleaner");
    cluster.start_coordinator();
    cluster.start_worker("worker");
    cluster.start_trainer("trainer", 2);
    let manifest = dataset(&cluster);
    assert_eq!(proto::Split::ALL.map(|split| manifest.samples(split)).iter().sum::<u64>(), 60);
    for arch in ["alexnet-bn", "alexnet", "alexnet-2012", "alexnet-slim"] {
        let model = format!("model.arch=\"{arch}\"");
        cluster.gleaner(
            &[
                &["run", "submit", "--dataset", "small", "--name", arch, "--wait", "--timeout", "120s"][..],
                &["--set", &model, "--set", "model.width=0.125", "--set", "input.crop=64", "--set", "train.epochs=2"],
                &["--set", "train.batch=16", "--set", "ranks.max=2", "--set", "ranks.lanes=2"],
            ]
            .concat(),
        );
        let run = cluster.json(&["run", "describe", arch]);
        assert_eq!(run["state"], "done", "{run}");

        let folder = cluster.path(arch).display().to_string();
        cluster.gleaner(&["run", "model", arch, "--to", &folder]);
        let script = root().join("tests/python/exported_model.py");
        let differences = printed(python("python").arg(script).arg(&folder));
        assert_eq!(differences.split_whitespace().count(), 4, "{differences}");
        for difference in differences.split_whitespace() {
            let difference: f64 = difference.parse().expect("a number");
            assert!(difference < 1e-4, "{arch}: TorchScript, ONNX: {differences}");
        }
    }
}

#[test]
fn workers_and_trainers_need_no_more_of_the_store_than_their_own_parts() {
    let s3 = SeaweedFs::start(&[
        ("coordinator", "one", &["Admin", "Read", "Write", "List", "Tagging"]),
        ("worker", "two", &["Read:gleaner", "List:gleaner", "Write:gleaner/cluster/datasets/*"]),
        ("trainer", "three", &["Read:gleaner", "List:gleaner", "Write:gleaner/cluster/runs/*"]),
    ]);
    let mut cluster = Cluster::new(Some("s3://gleaner/cluster"), s3_environment(s3.s3));
    s3.make_bucket("gleaner");
    let act_as = |cluster: &mut Cluster, key: &str, secret: &str| {
        cluster.set_env("AWS_ACCESS_KEY_ID", key);
        cluster.set_env("AWS_SECRET_ACCESS_KEY", secret);
    };
    act_as(&mut cluster, "coordinator", "one");
    cluster.start_coordinator();
    act_as(&mut cluster, "worker", "two");
    cluster.start_worker("worker");
    act_as(&mut cluster, "trainer", "three");
    cluster.start_trainer("trainer", 1);
    dataset(&cluster);
    let small = ["--set", "model.arch=\"alexnet-slim\"", "--set", "model.width=0.25", "--set", "input.crop=64"];
    let run =
        ["run", "submit", "--dataset", "small", "--name", "run", "--set", "train.epochs=2", "--set", "train.batch=16"];
    cluster.gleaner(&[&run[..], &small, &["--wait", "--timeout", "120s"]].concat());
    assert_eq!(cluster.json(&["run", "describe", "run"])["state"], "done");

    // Neither writes into the other's part: each tries to export there.
    let mut export = |key: &str, secret: &str, to: &str| {
        act_as(&mut cluster, key, secret);
        let to = format!("s3://gleaner/cluster/{to}/of-{key}");
        let output = cluster.try_gleaner(&["dataset", "export", "small", "--as", "list", "--to", &to]);
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for (key, secret, own, other) in [("worker", "two", "datasets", "runs"), ("trainer", "three", "runs", "datasets")] {
        let (allowed, said) = export(key, secret, own);
        assert!(allowed, "{key}: {said}");
        let (allowed, said) = export(key, secret, other);
        assert!(!allowed && (said.contains("403") || said.contains("denied")), "{key}: {said}");
    }
}

#[test]
fn colours_become_srgb_as_littlecms_has_them() {
    use image::{ImageEncoder, codecs::png::PngEncoder};
    use moxcms::{ColorProfile, ToneReprCurve};
    const SIDE: u32 = 96;
    let pixels: Vec<u8> = (0..SIDE * SIDE)
        .flat_map(|i| {
            let (x, y) = (i % SIDE, i / SIDE);
            [x * 255 / (SIDE - 1), y * 255 / (SIDE - 1), (x * 7 + y * 13) % 256].map(|value| value as u8)
        })
        .collect();
    let light = Some(ToneReprCurve::Parametric(vec![1.0]));
    let mut linear = ColorProfile::new_srgb();
    (linear.red_trc, linear.green_trc, linear.blue_trc) = (light.clone(), light.clone(), light);
    let profiles =
        [("adobe", ColorProfile::new_adobe_rgb()), ("p3", ColorProfile::new_display_p3()), ("linear", linear)];
    let folder = tempfile::tempdir().expect("a folder");
    let resize = proto::Resize { mode: proto::ResizeMode::None, format: proto::ImageFormat::Png, ..Default::default() };
    let difference = |ours: &[u8], theirs: &[u8]| {
        assert_eq!(ours.len(), theirs.len());
        ours.iter().zip(theirs).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / ours.len() as f64
    };
    for (name, mut profile) in profiles {
        // It would say the same in another way, which littlecms does not read.
        profile.cicp = None;
        let icc = profile.encode().expect("a profile");
        let mut png = Vec::new();
        let mut encoder = PngEncoder::new(&mut png);
        encoder.set_icc_profile(icc.clone()).expect("PNG has room for it");
        encoder.write_image(&pixels, SIDE, SIDE, image::ExtendedColorType::Rgb8).expect("in memory");
        let (width, height) = (SIDE as usize, SIDE as usize);
        let format = turbojpeg::PixelFormat::RGB;
        let plain = turbojpeg::Image { pixels: &pixels[..], width, pitch: 3 * width, height, format };
        let jpeg = turbojpeg::compress(plain, 95, turbojpeg::Subsamp::None).expect("encodes");
        let body = [b"ICC_PROFILE\0\x01\x01", &icc[..]].concat();
        let segment = [&[0xff, 0xe2], &(body.len() as u16 + 2).to_be_bytes()[..], &body].concat();
        let jpeg = [&jpeg[..2], &segment, &jpeg[2..]].concat();
        for (ending, bytes) in [("png", png), ("jpg", jpeg)] {
            let path = folder.path().join(format!("{name}.{ending}"));
            std::fs::write(&path, &bytes).expect("room on the disk");
            let script = root().join("tests/python/colours.py");
            let theirs = printed(python("python").arg(script).arg(path));
            let theirs = hex::decode(theirs.split_whitespace().nth(2).expect("pixels")).expect("hex");
            let prepare = |resize| worker::Preparer::new(resize).expect("libjpeg-turbo").prepare(&bytes).expect("kept");
            let ours = difference(&prepare(resize).values, &theirs);
            let before = difference(&prepare(proto::Resize { color: proto::Color::AsIs, ..resize }).values, &theirs);
            println!("colours: {name}.{ending}: mean difference {ours:.3} of 255, without the profile {before:.1}");
            assert!(ours < 1.5 && before > 4.0, "{name}.{ending}: {ours}, {before}");
        }
    }
}

#[test]
fn pictures_are_scaled_as_pillow_and_opencv_scale_them() {
    use proto::Filter::{Area, Bilinear, Lanczos3};
    let noise = |x: u32, y: u32| (x * 7919 + y * 104_729).wrapping_mul(2_654_435_761) >> 24;
    let image = image::RgbImage::from_fn(300, 217, |x, y| {
        image::Rgb([x * 255 / 299, (noise(x, y) + y) / 2, (x * x / 40 + y * 3) % 256].map(|value| value.min(255) as u8))
    });
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("photo.png");
    image.save(&path).expect("room on the disk");
    let png = std::fs::read(&path).expect("it is there");
    for (filter, name) in [(Lanczos3, "lanczos3"), (Area, "area"), (Bilinear, "bilinear")] {
        for size in [100, 31, 400] {
            let (mode, format) = (proto::ResizeMode::KeepRatio, proto::ImageFormat::Png);
            let resize = proto::Resize { size, mode, filter, format, ..Default::default() };
            let ours = worker::Preparer::new(resize).expect("libjpeg-turbo").prepare(&png).expect("kept");
            let (width, height) = (ours.width.to_string(), ours.height.to_string());
            // Nothing is covered when it is enlarged.
            let like = if size == 400 && filter == Area { "lanczos3" } else { name };
            let script = root().join("tests/python/scaled.py");
            let theirs = printed(python("python").arg(script).arg(&path).args([width.as_str(), &height, like]));
            let theirs = hex::decode(theirs.trim()).expect("hex");
            assert_eq!(ours.values.len(), theirs.len());
            let differences = || ours.values.iter().zip(&theirs).map(|(a, b)| a.abs_diff(*b));
            let (worst, sum) = (differences().max().unwrap_or(0), differences().map(f64::from).sum::<f64>());
            let mean = sum / theirs.len() as f64;
            println!("{name} to {width} x {height}: {mean:.3} of 255, at most {worst}");
            // Pillow cuts off what overshoots after the step across, and we after the step down.
            let most = if like == "lanczos3" { u8::MAX } else { 1 };
            assert!(worst <= most && mean < 0.6, "{name} to {width} x {height}");
        }
    }
}
