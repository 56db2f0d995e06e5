use std::fs;

use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::json;

use super::*;

fn files(paths: &[&Path]) -> Files {
    let from = paths.iter().map(|path| Location::Path(path.canonicalize().expect("it is there"))).collect();
    Files { from, unlabelled: false, class_column: None, image_column: None, keep: Vec::new() }
}

/// The lines, each with the part of its address that is behind the last slash in the place of the whole.
fn lines(files: &Files) -> Result<Vec<Value>> {
    let mut lines = Vec::new();
    files.each(&mut |line| {
        let mut line = line.clone();
        let url = line[URL].as_str().expect("a text").to_owned();
        assert!(proto::files::parse(&url).is_some(), "{url}");
        line.insert(URL.into(), url.rsplit('/').next().into());
        lines.push(Value::from(line));
        Ok(())
    })?;
    Ok(lines)
}

fn tree(files: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for file in files {
        let path = folder.path().join(file);
        fs::create_dir_all(path.parent().expect("a folder")).expect("writable");
        fs::write(path, file).expect("writable");
    }
    folder
}

#[test]
fn a_folders_classes_are_its_topmost_folders_unless_all_of_these_are_splits() {
    let plain = tree(&["train/a.jpg", "car & bus/b.jpg", "car & bus/more/c.png", "README", ".git/d.jpg"]);
    let found = lines(&files(&[plain.path()])).expect("pictures");
    let line = |url: &str, class: &str, split: Option<&str>| json!({URL: url, CLASS: class, SPLIT: split});
    let expected = [line("b.jpg", "car & bus", None), line("c.png", "car & bus", None), line("a.jpg", "train", None)];
    assert_eq!(found, expected);

    let split = tree(&["train/dog/a.jpg", "val/dog/b.jpg", "Test/cat/c.jpg", "val/stray.jpg", "classes.csv"]);
    std::os::unix::fs::symlink(plain.path(), split.path().join("train/link")).expect("writable");
    let found = lines(&files(&[split.path()])).expect("pictures");
    let expected = [
        line("c.jpg", "cat", Some("test")),
        line("a.jpg", "dog", Some("train")),
        line("b.jpg", "dog", Some("validation")),
    ];
    assert_eq!(found, expected);
    let unlabelled = Files { unlabelled: true, ..files(&[split.path()]) };
    assert_eq!(lines(&unlabelled).expect("pictures").len(), 5);

    let flat = tree(&["a.jpg", "b.jpg"]);
    let refused = lines(&files(&[flat.path()])).expect_err("no classes").to_string();
    assert!(refused.contains("2 files have no class") && refused.contains("--unlabelled"), "{refused}");
    assert!(lines(&files(&[tree(&[]).path()])).is_err());
    assert!(lines(&Files { keep: vec!["caption".into()], ..files(&[plain.path()]) }).is_err());
    let refused = lines(&files(&[&plain.path().join("README")])).expect_err("no archive").to_string();
    assert!(refused.contains("a folder, a .tar or a .parquet is wanted"), "{refused}");
}

#[test]
fn what_stands_beside_a_picture_in_a_tar_says_its_class_and_travels() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("set-validation-00.tar");
    let mut tar = tar::Builder::new(fs::File::create(&path).expect("writable"));
    let mut add = |name: &str, data: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_cksum();
        tar.append_data(&mut header, name, data).expect("written");
    };
    add("0.jpg", b"first");
    add("0.cls", b"3\n");
    add("0.txt", b"a dog");
    add("1.json", br#"{"synset": "n1", "url": "http://a/", "split": 7, "license": "x"}"#);
    add("1.cls", b"4");
    add("1.left.png", b"second");
    add("1.right.png", b"third");
    add("2.json", b"{}");
    add("test/wren/3.jpeg", b"fourth");
    add("4.jpg", b"without a class");
    tar.into_inner().expect("written");
    let kept = Files { keep: vec!["all".into()], ..files(&[&path]) };
    let found = lines(&kept).expect("pictures");
    let classes: Vec<_> = found.iter().map(|line| (line[CLASS].as_str(), line[SPLIT].as_str())).collect();
    let validation = |class| (Some(class), Some("validation"));
    assert_eq!(classes, [validation("3"), validation("n1"), validation("n1"), validation("wren")]);
    assert_eq!(found[0]["caption"], "a dog");
    let expected = ["http://a/", "x"].map(Value::from);
    assert_eq!([&found[1]["list_url"], &found[1]["license"]], [&expected[0], &expected[1]]);
    let mut parts = Vec::new();
    kept.each(&mut |line| {
        let url = proto::files::parse(line[URL].as_str().expect("a text")).expect("an address");
        let Part::Bytes { offset, length, .. } = url.part else { panic!("{url}") };
        parts.push(fs::read(&path).expect("a tar")[offset as usize..(offset + length) as usize].to_vec());
        Ok(())
    })
    .expect("pictures");
    assert_eq!(parts, [&b"first"[..], b"second", b"third", b"fourth"]);
}

/// As `datasets` writes it.
fn parquet(path: &Path, labels: &[i64]) {
    let schema = "message schema { optional group image { optional binary bytes; optional binary path (UTF8); }
                  optional int64 label; optional binary text (UTF8); }";
    let features = json!({"info": {"features": {
        "image": {"_type": "Image"},
        "label": {"names": ["wren", "robin", "owl"], "_type": "ClassLabel"},
        "text": {"dtype": "string", "_type": "Value"},
    }}});
    let metadata = vec![KeyValue::new("huggingface".to_owned(), features.to_string())];
    let properties = WriterProperties::builder().set_key_value_metadata(Some(metadata)).build();
    let schema = std::sync::Arc::new(parse_message_type(schema).expect("a schema"));
    let file = fs::File::create(path).expect("writable");
    let mut writer = SerializedFileWriter::new(file, schema, properties.into()).expect("a writer");
    let mut group = writer.next_row_group().expect("a group");
    let texts: Vec<ByteArray> = labels.iter().map(|label| format!("text {label}").into_bytes().into()).collect();
    let levels = |level| vec![level; labels.len()];
    for place in 0.. {
        let Some(mut column) = group.next_column().expect("a column") else { break };
        match column.untyped() {
            ColumnWriter::Int64ColumnWriter(typed) => typed.write_batch(labels, Some(&levels(1)), None),
            ColumnWriter::ByteArrayColumnWriter(typed) => {
                typed.write_batch(&texts, Some(&levels(if place < 2 { 2 } else { 1 })), None)
            }
            _ => panic!("no such column"),
        }
        .expect("written");
        column.close().expect("written");
    }
    group.close().expect("written");
    writer.close().expect("written");
}

#[test]
fn a_parquet_file_says_its_classes_by_name_and_in_their_order() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("data/train-00000-of-00001.parquet");
    fs::create_dir(folder.path().join("data")).expect("writable");
    parquet(&path, &[2, 0, -1, 1]);
    let found = lines(&files(&[folder.path()])).expect("pictures");
    let line = |row: u64, class: &str| {
        let url = format!("train-00000-of-00001.parquet#column=image.bytes&span=0&row={row}");
        json!({URL: url, CLASS: class, SPLIT: "train"})
    };
    assert_eq!(found, [line(0, "owl"), line(1, "wren"), line(3, "robin")], "one is of no class");
    let names =
        |files: &Files| files.classes().expect("Parquet").into_iter().map(|class| class.synset).collect::<Vec<_>>();
    assert_eq!(names(&files(&[folder.path()])), ["wren", "robin", "owl"]);

    let kept = Files { keep: vec!["Text".into()], ..files(&[&path]) };
    assert_eq!(lines(&kept).expect("pictures")[0]["text"], "text 2");
    let by_text = Files { class_column: Some("text".into()), ..files(&[&path]) };
    assert_eq!(lines(&by_text).expect("pictures")[2][CLASS], "text -1");
    assert!(names(&by_text).is_empty());
    let unlabelled = Files { unlabelled: true, ..files(&[&path]) };
    assert_eq!(lines(&unlabelled).expect("pictures").len(), 4);
    for (wrong, said) in [
        (Files { class_column: Some("kind".into()), ..files(&[&path]) }, "it has image, label, text"),
        (Files { image_column: Some("text".into()), ..files(&[&path]) }, "--image-column"),
        (Files { keep: vec!["caption".into(), "licence".into()], ..files(&[&path]) }, "--keep-columns licence"),
    ] {
        let refused = lines(&wrong).expect_err(said).to_string();
        assert!(refused.contains(said), "{refused}");
    }
}

#[test]
fn a_parquet_file_that_claims_more_rows_than_it_has_bytes_is_refused_before_the_first_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.parquet");
    // The same picture, class and text again and again take almost no room.
    parquet(&path, &[0; 100_000]);
    for unlabelled in [false, true] {
        let mut taken = 0;
        let files = Files { unlabelled, ..files(&[&path]) };
        let refused = files.each(&mut |_| {
            taken += 1;
            Ok(())
        });
        let refused = refused.expect_err("a claim").to_string();
        assert!(refused.contains("claims to have 100000 rows"), "{refused}");
        assert_eq!(taken, 0);
    }
}

#[test]
fn damage_to_a_tar_or_a_parquet_file_is_an_error_or_is_passed_over_and_never_a_panic() {
    let folder = tempfile::tempdir().expect("a folder");
    let [tar, table] = ["a.tar", "a.parquet"].map(|name| folder.path().join(name));
    parquet(&table, &[2, 0, -1, 1, 1, 0]);
    let mut builder = tar::Builder::new(fs::File::create(&tar).expect("writable"));
    for (name, data) in [("wren/0.jpg", &b"first"[..]), ("wren/0.json", br#"{"label": 1}"#), ("wren/1.jpg", b"second")]
    {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_cksum();
        builder.append_data(&mut header, name, data).expect("written");
    }
    builder.into_inner().expect("written");
    for path in [tar, table] {
        let whole = fs::read(&path).expect("it is there");
        let mut refused = 0;
        for seed in 0..1500 {
            let (mut random, mut bytes) = (fastrand::Rng::with_seed(seed), whole.clone());
            for _ in 0..random.usize(1..6) {
                let at = random.usize(..bytes.len());
                bytes[at] = random.u8(..);
            }
            if random.u8(..) < 64 {
                bytes.truncate(random.usize(..bytes.len()));
            }
            fs::write(&path, &bytes).expect("writable");
            for unlabelled in [false, true] {
                let files = Files { unlabelled, keep: vec!["all".into()], ..files(&[&path]) };
                refused += u32::from(lines(&files).is_err());
            }
        }
        assert!(refused > 300, "{}: {refused} of 3000 refused", path.display());
    }
}
