//! Columns of a list that travel with a sample: a JSON object as text, without line breaks. They are members of the
//! sample's `KEY.json`, and a caption among them is its `KEY.txt`.

use serde_json::{Map, Value};

/// A value of more bytes is cut if it is a text, and left out if not.
pub const LONGEST_VALUE: usize = 4 << 10;
/// All columns of a row together, but for its classes; what comes after that is left out.
pub const LONGEST_COLUMNS: usize = 16 << 10;
/// The member with all classes of a picture that has several.
pub const SYNSETS: &str = "synsets";
/// Members of a sample's JSON that are Gleaner's own.
const OWN: [&str; 6] = ["synset", SYNSETS, "url", "sha256", "width", "height"];
/// What columns with captions are called, the most telling first, in lower case and without punctuation.
const CAPTIONS: [&str; 7] = ["caption", "text", "alttext", "alt", "description", "title", "prompt"];

/// A column's name as a member of a sample's JSON: those that are Gleaner's own have other values.
pub fn member(column: &str) -> String {
    if OWN.contains(&column) { format!("list_{column}") } else { column.to_owned() }
}

/// Whether these are the columns of a picture that has several classes: all of them stand in front.
pub fn has_several_classes(columns: &str) -> bool {
    columns.strip_prefix("{\"").and_then(|rest| rest.strip_prefix(SYNSETS)).is_some_and(|rest| rest.starts_with("\":["))
}

/// The same columns, with all classes of a picture in front.
pub fn with_classes<'a>(columns: &str, synsets: impl Iterator<Item = &'a str>) -> String {
    let synsets: Vec<&str> = synsets.collect();
    let mut json = format!("{{\"{SYNSETS}\":{}", Value::from(synsets));
    match columns.strip_prefix('{') {
        Some(columns) => json.extend([",", columns]),
        None => json.push('}'),
    }
    json
}

/// A name by which columns are compared: in lower case and without punctuation.
pub fn plain(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

/// The place of the column that holds a caption.
pub fn caption_of<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Option<usize> {
    CAPTIONS.iter().find_map(|caption| names.clone().position(|name| plain(name) == *caption))
}

/// The caption among a sample's columns.
pub fn caption(columns: &str) -> Option<String> {
    let mut columns: Map<String, Value> = serde_json::from_str(columns).ok()?;
    let name = columns.keys().nth(caption_of(columns.keys().map(String::as_str))?)?.clone();
    match columns.remove(&name)? {
        Value::String(caption) if !caption.is_empty() => Some(caption),
        _ => None,
    }
}

/// Writes the columns of one row after the other.
#[derive(Debug, Default)]
pub struct Columns {
    json: Vec<u8>,
    closed: bool,
}

impl Columns {
    /// Begins with a new row.
    pub fn clear(&mut self) {
        self.json.clear();
        self.closed = false;
    }

    /// Adds a text: as much of it as may be.
    pub fn text(&mut self, member: &str, text: &str) {
        let mut most = text.len().min(LONGEST_VALUE);
        // Escapes may make more of it than fits.
        loop {
            let end = (0..=most).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
            if self.add(member, |json| serde_json::to_writer(json, &text[..end])) || end < 64 {
                return;
            }
            most = end / 2;
        }
    }

    /// Adds any value, if it is not too large.
    pub fn value(&mut self, member: &str, value: &Value) {
        match value {
            Value::String(text) => self.text(member, text),
            value => drop(self.add(member, |json| serde_json::to_writer(json, value))),
        }
    }

    /// Whether it fits.
    fn add(&mut self, member: &str, value: impl FnOnce(&mut Vec<u8>) -> serde_json::Result<()>) -> bool {
        let before = self.json.len();
        self.json.push(if before == 0 { b'{' } else { b',' });
        let written = serde_json::to_writer(&mut self.json, member).and_then(|()| {
            self.json.push(b':');
            value(&mut self.json)
        });
        let fits = self.json.len() - before <= 2 * LONGEST_VALUE && self.json.len() < LONGEST_COLUMNS;
        let kept = written.is_ok() && fits;
        if !kept {
            self.json.truncate(before);
        }
        kept
    }

    /// The row as text; empty if it has no columns.
    pub fn finish(&mut self) -> &str {
        if !self.closed && !self.json.is_empty() {
            self.json.push(b'}');
        }
        self.closed = true;
        std::str::from_utf8(&self.json).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn columns_are_json_without_line_breaks_and_within_their_bounds() {
        let mut columns = Columns::default();
        assert_eq!(columns.finish(), "");
        columns.clear();
        columns.text("caption", "a \"dog\"\n\tin the fog");
        columns.value("boxes", &json!([[0.5, 1], {"a": null}]));
        let text = columns.finish().to_owned();
        assert_eq!(columns.finish(), text);
        assert!(!text.contains(['\n', '\t']), "{text}");
        assert_eq!(caption(&text), Some("a \"dog\"\n\tin the fog".to_owned()));
        let read: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(read["boxes"], json!([[0.5, 1], {"a": null}]));

        columns.clear();
        columns.text("text", &"é\u{1}".repeat(500_000));
        columns.value("large", &json!(vec![1.5; 10_000]));
        (0..9).for_each(|n| columns.text(&format!("more{n}"), &"x".repeat(3000)));
        columns.text("last", "y");
        let text = columns.finish();
        assert!(text.len() <= LONGEST_COLUMNS, "{}", text.len());
        let read: Map<String, Value> = serde_json::from_str(text).expect("JSON");
        assert!(read["text"].as_str().is_some_and(|text| text.len() > 1 << 10) && read["last"] == "y");
        assert!(read.contains_key("more0") && !read.contains_key("large") && !read.contains_key("more8"));
    }

    #[test]
    fn the_caption_is_what_is_called_so_most_plainly() {
        assert_eq!(caption(r#"{"TEXT": "b", "title": "t"}"#).as_deref(), Some("b"));
        assert_eq!(caption(r#"{"alt-text": "a", "Caption": "c"}"#).as_deref(), Some("c"));
        for none in ["", "{}", r#"{"caption": 7}"#, r#"{"caption": ""}"#, r#"{"license": "x"}"#, "no JSON"] {
            assert_eq!(caption(none), None, "{none}");
        }
    }

    #[test]
    fn all_classes_of_a_picture_stand_in_front() {
        for columns in ["", r#"{"a":1}"#] {
            assert!(!has_several_classes(columns));
            let several = with_classes(columns, ["n1", "golden \"retriever\""].into_iter());
            assert!(has_several_classes(&several));
            let read: Value = serde_json::from_str(&several).expect("JSON");
            assert_eq!(read["synsets"], json!(["n1", "golden \"retriever\""]));
            assert_eq!(read.get("a").is_some(), !columns.is_empty());
        }
    }

    #[test]
    fn columns_never_stand_in_the_place_of_gleaners_own_members() {
        assert_eq!(["width", "license"].map(member), ["list_width", "license"]);
    }
}
