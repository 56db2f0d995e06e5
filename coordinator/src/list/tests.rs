use std::io::Write;
use std::sync::Arc;

use parquet::basic::{BrotliLevel, Compression, GzipLevel, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use proto::Synset;
use proto::outcomes::LONGEST_URL;

use super::*;

type Group<'a, 'b> = SerializedRowGroupWriter<'a, &'b mut Vec<u8>>;

fn auto() -> ListOptions {
    ListOptions::default()
}

/// Pictures without classes, with these columns.
fn keeping(keep: &str) -> ListOptions {
    let keep = keep.split(',').map(str::to_owned).collect();
    ListOptions { unlabelled: true, keep, ..ListOptions::default() }
}

/// The entries as `synset url columns`, bad lines as `number: what`.
fn all(name: &str, bytes: &[u8], options: &ListOptions) -> Result<Vec<String>, Error> {
    let mut found = Vec::new();
    read(name, Cursor::new(bytes.to_vec()), options, &mut |number, line| {
        found.push(match line {
            Line::Entry(Entry { synset, url, columns }) => format!("{synset} {url} {columns}").trim_end().to_owned(),
            Line::Absent => format!("{number}- absent"),
            Line::Bad(what) => format!("{number}: {what}"),
        });
        Ok(())
    })?;
    Ok(found)
}

fn refusal(name: &str, bytes: &[u8], options: &ListOptions) -> String {
    all(name, bytes, options).expect_err("refused").to_string()
}

#[test]
fn every_format_is_told_by_its_first_lines_and_gives_the_same_entries() {
    let expected = ["n1 http://a/x,y", "n2 ftp://b"];
    for list in [
        "# list\n\nn1\thttp://a/x,y\r\nn2\tftp://b",
        "n1_77\thttp://a/x,y\nn2_8\tftp://b\n",
        "http://a/x,y\tn1\nftp://b\tn2\n",
        "\"n1\"\t\"http://a/x,y\"\n\"n2\"\t\"ftp://b\"\n",
        "id,url,synset\n1,\"http://a/x,y\",n1\n# no\n2,ftp://b,n2\n",
        "id;url;synset\n1;http://a/x,y;n1\n2;ftp://b;n2\n",
        "\u{feff}synset\turl\nn1\thttp://a/x,y\nn2\tftp://b\n",
        "n1 http://a/x,y\nn2 ftp://b\n",
        "url,label,,\n\"http://a/x,y\",n1,,\nftp://b,n2,,,\n",
        "ImageID,OriginalURL,LabelName,Confidence\n1,\"http://a/x,y\",n1,1\n2,ftp://b,n2,0.8\n",
        "{\"image_url\": \"http://a/x,y\", \"label\": \"n1\"}\n\n{\"label\": \"n2\", \"image_url\": \"ftp://b\"}\n",
    ] {
        assert_eq!(all("l", list.as_bytes(), &auto()).expect("reads"), expected, "{list}");
    }
}

#[test]
fn lists_are_unpacked_by_their_first_bytes_whatever_their_name() {
    let plain = "n1\thttp://a/\n".repeat(1000);
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(plain.as_bytes()).expect("to memory");
    let zst = zstd::encode_all(plain.as_bytes(), 1).expect("to memory");
    for bytes in [gz.finish().expect("to memory"), zst] {
        assert_eq!(all("l.txt", &bytes, &auto()).expect("reads").len(), 1000);
        assert!(matches!(all("l.txt", &bytes[..bytes.len() - 5], &auto()), Err(Error::Invalid(_))), "cut short");
    }
}

/// A tar of files.
fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, name, *bytes).expect("to memory");
    }
    tar.into_inner().expect("to memory")
}

#[test]
fn a_tar_is_read_file_by_file() {
    let list = b"n1_0\thttp://a/0\nn2_1\thttp://a/1\n";
    let packed = zstd::encode_all(&list[..], 1).expect("to memory");
    let inner =
        tar(&[("fall11_urls.txt", list), ("notes.md", b"not a list"), (".hidden", b"x"), ("b/more.zst", &packed)]);
    let gz = {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&tar(&[("inner.list", &inner)])).expect("to memory");
        gz.finish().expect("to memory")
    };
    let twice = ["n1 http://a/0", "n2 http://a/1", "n1 http://a/0", "n2 http://a/1"];
    assert_eq!(all("fall11.tgz", &inner, &auto()).expect("reads"), twice);
    assert_eq!(all("fall11.tgz", &gz, &auto()).expect("reads"), twice);
    assert!(matches!(all("l", &inner[..700], &auto()), Err(Error::Invalid(_))), "cut short");
    let error = refusal("l.tar", &tar(&[("0001.jpg", b"\xff\xd8")]), &auto());
    assert!(error.contains("without a list in it: 0001.jpg"), "{error}");

    let long = format!("{}/urls.txt", "long".repeat(100));
    assert_eq!(all("l.tar", &tar(&[(&long, list)]), &auto()).expect("reads"), twice[..2]);
    let mut endless = tar::Header::new_gnu();
    endless.set_entry_type(tar::EntryType::GNULongName);
    endless.set_size(2 * LONGEST_HEADERS);
    endless.set_cksum();
    let endless = [endless.as_bytes(), &vec![b'a'; 2 * LONGEST_HEADERS as usize][..]].concat();
    let error = refusal("l.tar", &endless, &auto());
    assert!(error.contains("stands before a file"), "{error}");
    // Files themselves may be longer.
    let more = "n1\thttp://a/\n".repeat(100_000);
    let files = tar(&[("no.list.jpg", more.as_bytes()), ("l.txt", more.as_bytes())]);
    assert_eq!(all("l.tar", &files, &auto()).expect("reads").len(), 100_000);
}

#[test]
fn what_is_no_list_is_refused_by_name_with_the_way_out() {
    for (bytes, said) in [
        (&b"BZh91AY&SY"[..], "bunzip2"),
        (b"\xfd7zXZ\0\0\x04", "xz -dc"),
        (b"PK\x03\x04\x14\0", "Excel"),
        (b"\xff\xfen\x001\x00\t\x00", "UTF-16"),
        (b"[\n {\"url\": \"http://a\"}]", "jq -c '.[]'"),
        (b"\n<!DOCTYPE html><html><body>Log in</body>", "web page"),
        (b"%PDF-1.7", "PDF"),
        (b"n1\thttp://a/1.jpg\rn2\thttp://a/2.jpg\r", "tr '\\r' '\\n'"),
    ] {
        let error = refusal("l.txt", bytes, &auto());
        assert!(error.contains(said) && error.starts_with("l.txt: "), "{error}");
    }
}

#[test]
fn lines_without_class_or_url_are_bad_and_say_why() {
    let long = "x".repeat(LONGEST_LINE + 1000);
    let more = format!("\n{0}\tu\nn1\t{1}\nn2\t::\n", &long[..Synset::LONGEST + 1], &long[..LONGEST_URL + 1]);
    let some =
        b"n1\thttp://a\nnothing\n\tu\nn1\t \na b\tu\n\xff\tu\nn1\thttp://a/\xe9t\xe9\n\x1b\tu\nn1\tu\tv\n".as_slice();
    let list = [some, b"http://a/\thttp://b/\n", long.as_bytes(), more.as_bytes()].concat();
    let options = ListOptions { format: ListFormat::SynsetUrl, ..auto() };
    let found = all("l", &list, &options).expect("reads");
    let starts = [
        "n1 http://a",
        "2: no tab",
        "3: no synset",
        "4: no URL",
        "a b u",
        "6: not UTF-8",
        "n1 http://a/%E9t%E9",
        "8: synset \"\\u{1b}\" has a control",
        "9: 3 fields",
        "10: the class is a URL",
        "11: longer",
        "12: a synset of 129 bytes",
        "13: a URL of 8193 bytes",
        "n2 ::",
    ];
    assert_eq!(found.len(), starts.len(), "{found:?}");
    for (line, start) in found.iter().zip(starts) {
        assert!(line.starts_with(start), "{line}");
    }
}

#[test]
fn a_row_with_another_number_of_fields_is_never_shifted_into_a_class() {
    let list = "url,label\nhttp://a/1.jpg,n1\nhttp://a/2.jpg?crop=1,2,n2\nhttp://a/3.jpg\nhttp://a/4.jpg,n3,\n";
    let found = all("l.csv", list.as_bytes(), &auto()).expect("reads");
    assert_eq!([&found[0], &found[3]], ["n1 http://a/1.jpg", "n3 http://a/4.jpg"]);
    assert!(found[1].starts_with("3: 3 fields, but the header has 2"), "{}", found[1]);
    assert!(found[2].starts_with("4: 1 fields"), "{}", found[2]);
    let list = "n1\thttp://a/1\tx\nn1\thttp://a/2\ty\nn2\thttp://a/3\nn2\thttp://a/4\tz\n";
    let found = all("l", list.as_bytes(), &auto()).expect("reads");
    assert!(found[2].starts_with("3: 2 fields, but the first lines have 3"), "{found:?}");
    assert_eq!(found[3], "n2 http://a/4");
}

#[test]
fn a_missing_column_and_an_endless_quote_are_refused() {
    let csv = ListOptions {
        format: ListFormat::Csv,
        synset_column: "class".into(),
        url_column: "u".into(),
        ..ListOptions::default()
    };
    let error = refusal("l.csv", b"url,synset\n", &csv);
    assert!(error.contains("\"u\"") && error.contains("url, synset. Name"), "{error}");
    let error = refusal("l.csv", b"u,synset\n", &csv);
    assert!(error.contains("\"class\"") && error.contains("--unlabelled"), "{error}");
    let error = refusal("l.csv", b"photo,synset\n", &auto());
    assert!(error.contains("for the URL") && error.contains("--url-column"), "{error}");
    let error = refusal("l.tsv", b"URL\tTEXT\nhttp://a/\ta dog\n", &auto());
    assert!(error.contains("for the class; it has URL, TEXT"), "{error}");
    // Neither is another column taken for one that is not there, nor is a name that nobody could have given passed over.
    let misspelt = ListOptions { url_column: "URL".into(), ..auto() };
    let two = b"label,url,original\nn1,http://a/1,http://b/1\nn1,http://a/2,http://b/2\n";
    for (column, expected) in [("url", "n1 http://a/1"), ("original", "n1 http://b/1")] {
        let named = ListOptions { url_column: column.into(), ..auto() };
        assert_eq!(all("l", two, &named).expect("it is there")[0], expected);
    }
    let error = refusal("l", two, &misspelt);
    assert!(error.contains("\"URL\"") && error.contains("label, url, original"), "{error}");
    let error = refusal("l", b"n1\thttp://a/1\nn1\thttp://a/2\n", &misspelt);
    assert!(error.contains("no header") && error.contains("--columns"), "{error}");
    let endless = format!("class,u\nn1,\"{}", "x".repeat(9 << 20));
    let error = refusal("l.csv", endless.as_bytes(), &csv);
    assert!(error.contains("quote"), "{error}");
}

#[test]
fn classes_may_have_blanks_and_be_of_any_script_and_a_list_of_them() {
    let list =
        "{\"url\": \"u\", \"labels\": [\"golden retriever\", \"金毛犬\", 7]}\n{\"url\": \"v\", \"labels\": []}\n";
    let expected = ["golden retriever u", "金毛犬 u", "7 u", "2: no synset"];
    assert_eq!(all("l", list.as_bytes(), &auto()).expect("reads"), expected);
    let csv = "url,class\nhttp://a/?x=1&amp;y=2,\"  golden retriever \"\n";
    assert_eq!(all("l", csv.as_bytes(), &auto()).expect("reads"), ["golden retriever http://a/?x=1&y=2"]);
}

#[test]
fn a_bad_json_line_says_what_it_lacks() {
    let list = "{\"wnid\": 7, \"URL\": \"u\"}\n{\"class\": \"a\", \"url\": \"u\"}\n{\n{\"url\": \"u\"}\n\
                {\"class\": {}, \"url\": \"u\"}\n{\"class\": \"a\", \"url\": [1]}\n";
    let found = all("l", list.as_bytes(), &auto()).expect("reads");
    assert_eq!(found[..2], ["7 u", "a u"]);
    for (line, said) in found[2..].iter().zip(["no JSON", "for the class", "neither a text", "the URL is no text"]) {
        assert!(line.contains(said), "{line}");
    }
}

#[test]
fn a_class_that_open_images_says_is_not_in_the_picture_is_passed_over() {
    let list = "ImageID,OriginalURL,License,LabelName,Confidence\n1,http://a/,x,/m/1,1\n1,http://a/,x,/m/2,0\n";
    assert_eq!(all("l", list.as_bytes(), &auto()).expect("reads"), ["/m/1 http://a/", "3- absent"]);
    let other = "url,label,confidence\nhttp://a/,n1,0\n";
    assert_eq!(all("l", other.as_bytes(), &auto()).expect("reads"), ["n1 http://a/"], "it may mean anything");
}

#[test]
fn urls_are_made_of_columns_if_that_is_said() {
    let format = "https://x.org/photos/{photo_id}/medium.{extension}?v=1";
    let made = |keep: &str| ListOptions { url_format: format.into(), unlabelled: false, ..keeping(keep) };
    let expected = [
        "wren https://x.org/photos/7/medium.jpg?v=1 {\"photo_id\":\"7\"}",
        "3: no URL",
        "robin https://x.org/photos/9/medium.jpeg?v=1 {\"photo_id\":\"9\"}",
    ];
    let tsv = "photo_id\tlicense\textension\tname\n7\tcc\tjpg\twren\n8\tcc\t\trobin\n9\t\tjpeg\trobin\n";
    let named = ListOptions { synset_column: "name".into(), ..made("photo_id") };
    assert_eq!(all("l", tsv.as_bytes(), &named).expect("reads"), expected);
    let csv = tsv.replace('\t', ",");
    assert_eq!(all("l", csv.as_bytes(), &named).expect("reads"), expected);
    let bare = csv.split_once('\n').expect("a header").1;
    let columns = ["photo_id", "license", "extension", "name"].map(str::to_owned).to_vec();
    let bare = all("l", bare.as_bytes(), &ListOptions { columns, ..named.clone() }).expect("reads");
    assert_eq!([&bare[0], &bare[2]], [expected[0], expected[2]]);
    let json = "{\"photo_id\": 7, \"extension\": \"jpg\", \"class\": \"wren\"}\n";
    let json = all("l", json.as_bytes(), &made("photo_id")).expect("reads");
    assert_eq!(json, [r#"wren https://x.org/photos/7/medium.jpg?v=1 {"photo_id":7}"#]);

    let schema = "message m { optional binary label (UTF8); optional binary extension (UTF8);
        optional binary license (UTF8); optional binary photo_id (UTF8); }";
    let (labels, endings, ids) = (texts(&["wren"]), texts(&["png"]), texts(&["7"]));
    let file = parquet(schema, Compression::SNAPPY, &[&labels, &endings, &texts(&["cc"]), &ids]);
    let found = all("l", &file, &made("all")).expect("reads");
    let columns = r#"{"extension":"png","license":"cc","photo_id":"7"}"#;
    assert_eq!(found, [format!("wren https://x.org/photos/7/medium.png?v=1 {columns}")]);

    for (format, said) in [
        ("https://x.org/{id}.jpg", "no column \"id\"; the list has photo_id, license"),
        ("https://x.org/{photo_id", "not closed"),
        ("https://x.org/1.jpg", "no {COLUMN}"),
    ] {
        let options = ListOptions { url_format: format.into(), format: ListFormat::Tsv, ..named.clone() };
        let error = refusal("l", tsv.as_bytes(), &options);
        assert!(error.contains(said), "{error}");
    }
}

/// A Parquet file of optional columns, each written by a function.
fn parquet(schema: &str, compression: Compression, columns: &[&dyn Fn(&mut Group<'_, '_>)]) -> Vec<u8> {
    let mut file = Vec::new();
    let schema = Arc::new(parse_message_type(schema).expect("a schema"));
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut writer = SerializedFileWriter::new(&mut file, schema, properties).expect("to memory");
    let mut group = writer.next_row_group().expect("to memory");
    columns.iter().for_each(|column| column(&mut group));
    group.close().expect("to memory");
    writer.close().expect("to memory");
    file
}

fn texts<'a>(values: &'a [&'a str]) -> impl Fn(&mut Group<'_, '_>) + 'a {
    move |group| {
        let mut column = group.next_column().expect("to memory").expect("a column");
        let there: Vec<ByteArray> = values.iter().filter(|text| !text.is_empty()).map(|text| (*text).into()).collect();
        let levels: Vec<i16> = values.iter().map(|text| i16::from(!text.is_empty())).collect();
        column.typed::<ByteArrayType>().write_batch(&there, Some(&levels), None).expect("to memory");
        column.close().expect("to memory");
    }
}

#[test]
fn parquet_lists_are_read_whatever_their_codec_and_the_order_of_their_columns() {
    let schema = "message list { optional binary label (UTF8); optional int64 n; optional binary URL (UTF8); }";
    for codec in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::BROTLI(BrotliLevel::default()),
        Compression::LZ4,
        Compression::LZ4_RAW,
        Compression::ZSTD(ZstdLevel::default()),
    ] {
        let numbers = |group: &mut Group<'_, '_>| {
            let mut column = group.next_column().expect("to memory").expect("a column");
            column.typed::<Int64Type>().write_batch(&[5], Some(&[1, 0]), None).expect("to memory");
            column.close().expect("to memory");
        };
        let (labels, urls) = (texts(&["golden retriever", ""]), texts(&["http://a", "http://b"]));
        let file = parquet(schema, codec, &[&labels, &numbers, &urls]);
        let error = refusal("l", &file, &ListOptions { largest: Some(file.len() as u64 - 1), ..auto() });
        assert!(error.contains("--largest-list"), "{error}");
        let found = all("l", &file, &ListOptions { largest: Some(file.len() as u64), ..auto() }).expect("reads");
        assert_eq!(found, ["golden retriever http://a", "2: no synset"], "{codec:?}");
        let kept = all("l", &file, &keeping("n,label")).expect("reads");
        let expected = [r#"unlabelled http://a {"n":5,"label":"golden retriever"}"#, "unlabelled http://b"];
        assert_eq!(kept, expected, "{codec:?}");
        let named = ListOptions { url_column: "x".into(), ..auto() };
        assert!(refusal("l", &file, &named).contains("it has label, n, URL"));
        // Wherever it is damaged, it is read, or refused, and nothing panics.
        let mut refused = 0;
        for at in 0..file.len() {
            let mut damaged = file.clone();
            damaged[at] ^= 0xff;
            refused += usize::from(all("l", &damaged, &auto()).is_err());
        }
        assert!(refused > file.len() / 5, "{codec:?}: {refused} of {}", file.len());
    }
}

#[test]
fn datacomps_nested_columns_travel_and_its_longest_captions_are_cut() {
    let schema = "message m { optional binary uid (UTF8); optional binary url (UTF8); optional binary text (UTF8);
        optional group face_bboxes (LIST) { repeated group list { optional group element (LIST) {
            repeated group list { optional double element; } } } } optional binary sha256 (UTF8); }";
    let caption = "ü ".repeat(500_000);
    let boxes = |group: &mut Group<'_, '_>| {
        let mut column = group.next_column().expect("to memory").expect("a column");
        // [[0.25, 0.5]] and [].
        column.typed::<DoubleType>().write_batch(&[0.25, 0.5], Some(&[5, 5, 1]), Some(&[0, 2, 0])).expect("to memory");
        column.close().expect("to memory");
    };
    let uids = texts(&["u1", "u2"]);
    let both = [&*caption, "a dog"];
    let (urls, captions, hashes) = (texts(&["http://a", "http://b"]), texts(&both), texts(&["00", "01"]));
    let file = parquet(schema, Compression::SNAPPY, &[&uids, &urls, &captions, &boxes, &hashes]);
    let found = all("l", &file, &keeping("all")).expect("reads");
    let second = r#"{"uid":"u2","text":"a dog","face_bboxes":[],"list_sha256":"01"}"#;
    assert_eq!(found[1], format!("unlabelled http://b {second}"));
    assert!(found[0].contains(r#""face_bboxes":[[0.25,0.5]]"#) && found[0].len() < 5000, "{}", found[0].len());
    assert!(proto::columns::caption(found[0].rsplit(' ').next().unwrap_or_default()).is_none());
    let columns = &found[0]["unlabelled http://a ".len()..];
    assert!(proto::columns::caption(columns).is_some_and(|caption| caption.len() > 4000));
}

#[test]
fn coyo_and_laion_are_read_as_they_are_published() {
    let numbers = |values: &'static [i64]| {
        move |group: &mut Group<'_, '_>| {
            let mut column = group.next_column().expect("to memory").expect("a column");
            let levels = vec![1; values.len()];
            column.typed::<Int64Type>().write_batch(values, Some(&levels), None).expect("to memory");
            column.close().expect("to memory");
        }
    };
    let doubles = |group: &mut Group<'_, '_>| {
        let mut column = group.next_column().expect("to memory").expect("a column");
        column.typed::<DoubleType>().write_batch(&[0.25, 0.5], Some(&[1, 1]), None).expect("to memory");
        column.close().expect("to memory");
    };
    let (urls, captions, hashes) = (["http://a", "http://b"], ["a dog", "a cat"], ["8f9a", "00ff"]);
    let coyo = parquet(
        "message m { optional int64 id; optional binary url (UTF8); optional binary text (UTF8);
            optional int64 width; optional binary image_phash (UTF8); optional double aesthetic_score_laion_v2; }",
        Compression::SNAPPY,
        &[&numbers(&[7, 1 << 60]), &texts(&urls), &texts(&captions), &numbers(&[640, 5]), &texts(&hashes), &doubles],
    );
    let first = r#"{"id":7,"text":"a dog","list_width":640,"image_phash":"8f9a","aesthetic_score_laion_v2":0.25}"#;
    let found = all("coyo.parquet", &coyo, &keeping("all")).expect("reads");
    assert_eq!(found[0], format!("unlabelled http://a {first}"));
    let laion = parquet(
        "message m { optional binary URL (UTF8); optional binary TEXT (UTF8); optional int64 WIDTH;
            optional int64 HEIGHT; optional double similarity; optional int64 hash; }",
        Compression::SNAPPY,
        &[&texts(&urls), &texts(&captions), &numbers(&[640, 5]), &numbers(&[480, 5]), &doubles, &numbers(&[-1, 2])],
    );
    let found = all("laion.parquet", &laion, &keeping("all")).expect("reads");
    let second = r#"{"TEXT":"a cat","WIDTH":5,"HEIGHT":5,"similarity":0.5,"hash":2}"#;
    assert_eq!(found[1], format!("unlabelled http://b {second}"));
    let caption = all("laion.parquet", &laion, &keeping("caption")).expect("reads");
    assert_eq!(caption[0], r#"unlabelled http://a {"caption":"a dog"}"#);
    assert!(refusal("laion.parquet", &laion, &auto()).contains("--unlabelled"));
}

#[test]
fn the_lists_of_captions_that_are_published_are_read_as_they_are() {
    let cc3m = "a very typical bus station\thttp://a/1.jpg\nsierra looked stunning in this top\thttp://b/2.jpg?w=1\n";
    let cc12m = "http://a/1.jpg\ta very typical bus station\nhttp://b/2.jpg?w=1\tsierra looked stunning in this top\n";
    let expected = [
        r#"unlabelled http://a/1.jpg {"caption":"a very typical bus station"}"#,
        r#"unlabelled http://b/2.jpg?w=1 {"caption":"sierra looked stunning in this top"}"#,
    ];
    for list in [cc3m, cc12m] {
        assert_eq!(all("l.tsv", list.as_bytes(), &keeping("caption")).expect("reads"), expected);
        assert_eq!(all("l.tsv", list.as_bytes(), &keeping("all")).expect("reads"), expected);
    }
    let named = ListOptions { columns: vec!["url".into(), "title".into()], ..keeping("all") };
    let found = all("l.tsv", cc12m.as_bytes(), &named).expect("reads");
    assert_eq!(found[0], r#"unlabelled http://a/1.jpg {"title":"a very typical bus station"}"#);
    let urls = all("l.txt", b"http://a/1\n\nhttp://b/a photo.jpg\n", &ListOptions { keep: vec![], ..keeping("") });
    assert_eq!(urls.expect("reads"), ["unlabelled http://a/1", "unlabelled http://b/a photo.jpg"]);
    let laion =
        "{\"URL\":\"http://a\",\"TEXT\":\"a \\\"dog\\\"\",\"WIDTH\":640,\"similarity\":0.31,\"punsafe\":null}\n";
    let expected = r#"unlabelled http://a {"TEXT":"a \"dog\"","WIDTH":640,"similarity":0.31}"#;
    assert_eq!(all("l.jsonl", laion.as_bytes(), &keeping("all")).expect("reads"), [expected]);
}
