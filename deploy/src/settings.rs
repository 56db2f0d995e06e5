//! `--set KEY=VALUE`: single values put over a TOML file.

use anyhow::Result;
use toml::{Table, Value};

use crate::exit::Ended;

/// The tables of a TOML file.
pub(crate) fn read(path: &std::path::Path) -> Result<Table> {
    let name = path.display();
    let text = std::fs::read_to_string(path).map_err(|e| Ended::usage(format!("cannot read {name}: {e}")))?;
    text.parse().map_err(|e| Ended::usage(format!("{name}: {e}")))
}

/// Sets `train.epochs=3` in `table`. The value is TOML; what is none is taken as a string, so that words need no
/// quotes.
pub(crate) fn set(table: &mut Table, assignment: &str) -> Result<()> {
    let wrong = |what: &str| Ended::usage(format!("--set {assignment}: {what}"));
    let (path, text) = assignment.split_once('=').ok_or_else(|| wrong("write KEY=VALUE"))?;
    let mut keys: Vec<&str> = path.trim().split('.').collect();
    let last = keys.pop().filter(|key| !key.is_empty()).ok_or_else(|| wrong("the key is empty"))?;
    let mut table = table;
    for key in keys {
        let inner = table.entry(key).or_insert_with(|| Value::Table(Table::new()));
        table = inner.as_table_mut().ok_or_else(|| wrong(&format!("{key} is no table")))?;
    }
    table.insert(last.to_owned(), value(text.trim()));
    Ok(())
}

fn value(text: &str) -> Value {
    let parsed: Option<Table> = format!("value = {text}").parse().ok();
    let parsed = parsed.filter(|table| table.len() == 1).and_then(|mut table| table.remove("value"));
    parsed.unwrap_or_else(|| Value::String(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_put_over_the_file_with_their_types_and_words_need_no_quotes() {
        let mut table: Table = "dataset = \"a\"\n[train]\nepochs = 90\nbatch = 64".parse().expect("toml");
        for assignment in
            ["train.epochs=3", "model.arch=alexnet-slim", "input.flip = false", "dataset=\"b\"", "seed=1\nx=2"]
        {
            set(&mut table, assignment).expect(assignment);
        }
        let expected: Table = "dataset = \"b\"\nseed = \"1\\nx=2\"\n[train]\nepochs = 3\nbatch = 64\n\
                               [model]\narch = \"alexnet-slim\"\n[input]\nflip = false"
            .parse()
            .expect("toml");
        assert_eq!(table, expected);
    }

    #[test]
    fn assignments_without_key_or_through_a_value_are_refused() {
        let mut table: Table = "dataset = \"a\"".parse().expect("toml");
        for wrong in ["epochs", "=3", "train.=3", "dataset.x=1"] {
            assert!(set(&mut table, wrong).is_err(), "{wrong}");
        }
    }
}
