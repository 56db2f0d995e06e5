//! `/.well-known/tdmrep.json` (TDM Reservation Protocol): for which paths a site reserves text and data mining.

use proto::pb::{OptOut, PathRule, SiteRules};
use serde_json::Value;

use super::paths;

/// What it says. What is no such file says nothing, nor does an entry that is none.
pub(super) fn parse(text: &[u8]) -> SiteRules {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let entries = match serde_json::from_slice(text) {
        Ok(Value::Array(entries)) => entries,
        Ok(entry @ Value::Object(_)) => vec![entry],
        _ => Vec::new(),
    };
    SiteRules { rules: entries.iter().filter_map(rule).collect() }
}

fn rule(entry: &Value) -> Option<PathRule> {
    let pattern = paths::normal(entry.get("location")?.as_str()?.trim().as_bytes());
    let allowed = !is_reserved(entry.get("tdm-reservation")?)?;
    Some(PathRule { kind: OptOut::Tdm.into(), pattern, allowed })
}

fn is_reserved(value: &Value) -> Option<bool> {
    match value {
        Value::Number(number) => match number.as_u64()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        },
        Value::Bool(reserved) => Some(*reserved),
        Value::String(text) => said(text),
        _ => None,
    }
}

/// Whether a text says that it is reserved; None: it says nothing.
pub(super) fn said(text: &str) -> Option<bool> {
    match text.trim() {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::is_allowed;
    use super::*;
    use proto::Signal;

    #[test]
    fn locations_are_reserved_or_not_and_the_longest_one_counts() {
        let text = br#"[{"location": "/", "tdm-reservation": 1, "tdm-policy": "https://x/p.json"},
            {"location": "/free/*.jpg$", "tdm-reservation": 0}, {"location": "/free/x", "tdm-reservation": "1"},
            {"location": 7, "tdm-reservation": 1}, {"tdm-reservation": 1}, 5, {"location": "/y", "tdm-reservation": 9}]"#;
        let rules = parse(text);
        assert_eq!(rules.rules.len(), 3);
        let allows = |path: &str| is_allowed(&rules, Signal::Tdm, path);
        assert!(!allows("/a.jpg") && allows("/free/a.jpg") && !allows("/free/a.png"));
    }

    #[test]
    fn what_is_no_such_file_says_nothing() {
        for text in ["", "<html>", "{}", "[", "null", "[[]]", r#""/""#, r#"{"location": "/"}"#] {
            assert_eq!(parse(text.as_bytes()).rules, [], "{text}");
        }
        assert!(parse("[".repeat(100_000).as_bytes()).rules.is_empty(), "however deep");
        assert_eq!(parse(br#"{"location": "/", "tdm-reservation": 1}"#).rules.len(), 1, "one entry, not in a list");
    }
}
