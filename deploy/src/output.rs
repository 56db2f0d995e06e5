//! What people and programs read: data on standard output, chatter and progress on standard error.

use std::fmt::{self, Display, Write as _};
use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};
use serde::Serialize;

/// Without a terminal, progress is reported at most so often.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// How a read command answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// For programs: field names are those of the .proto files
    Json,
}

/// One line of data.
pub(crate) fn say(line: impl Display) {
    match writeln!(std::io::stdout().lock(), "{}", Harmless(line)) {
        Ok(()) => {}
        // Whoever read it has gone (`| head`): there is nobody left to work for. As a shell reports a SIGPIPE.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(141),
        Err(error) => {
            complain(format!("gleaner: cannot write to standard output: {error}"));
            std::process::exit(1);
        }
    }
}

/// Whether nothing is said but data and errors.
static QUIET: AtomicBool = AtomicBool::new(false);

/// Nothing is said from now on but data and errors.
pub(crate) fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// One line of chatter.
pub(crate) fn note(line: impl Display) {
    if !QUIET.load(Ordering::Relaxed) {
        complain(line);
    }
}

/// One line that is said in any case.
pub(crate) fn complain(line: impl Display) {
    // Without standard error there is no place to complain to.
    let _ = writeln!(std::io::stderr().lock(), "{}", Harmless(line));
}

/// A text without what would steer a terminal: lists and servers are others' words.
struct Harmless<T>(T);

impl<T: Display> Display for Harmless<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.to_string().chars() {
            match c {
                '\n' | '\t' => f.write_char(c)?,
                c if c.is_control() => write!(f, "{}", c.escape_default())?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// One JSON document, indented.
pub(crate) fn say_json(value: &impl Serialize) -> anyhow::Result<()> {
    say(serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Rows under headings, in columns as wide as their widest cell.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub(crate) fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|heading| heading.to_uppercase()).collect()] }
    }

    /// Appends a row; it has as many cells as there are headings.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The lines; columns in which every cell is a number are set to the right.
    pub(crate) fn lines(&self) -> Vec<String> {
        let columns = self.rows[0].len();
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let is_number = |column: usize| {
            let plain = |cell: &String| cell.trim_end_matches([' ', '%']).parse::<f64>().is_ok() || cell == "-";
            self.rows.len() > 1 && self.rows[1..].iter().all(|row| plain(&row[column]))
        };
        let shapes: Vec<(usize, bool)> = (0..columns).map(|column| (width(column), is_number(column))).collect();
        let line = |row: &Vec<String>| {
            let cell = |(cell, &(width, right)): (&String, &(usize, bool))| {
                if right { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
            };
            let cells: Vec<String> = row.iter().zip(&shapes).map(cell).collect();
            cells.join("  ").trim_end().to_owned()
        };
        self.rows.iter().map(line).collect()
    }

    /// Prints it.
    pub(crate) fn say(&self) {
        self.lines().iter().for_each(say);
    }
}

/// Progress of a wait on standard error: a bar on a terminal, now and then a plain line elsewhere.
pub(crate) struct Progress {
    bar: ProgressBar,
    reported: Option<Instant>,
    phase: String,
}

impl Progress {
    /// `unit` is what is counted ("URLs", "steps").
    pub(crate) fn new(unit: &str) -> Self {
        let target = match std::io::stderr().is_terminal() && !QUIET.load(Ordering::Relaxed) {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let style = ProgressStyle::with_template(&format!(
            "{{wide_bar}} {{pos}}/{{len}} {unit} {{per_sec}}, {{eta}} left  {{msg}}"
        ))
        .expect("a template of known parts");
        let bar = ProgressBar::with_draw_target(Some(0), target).with_style(style);
        Self { bar: bar.with_finish(ProgressFinish::AndClear), reported: None, phase: String::new() }
    }

    /// `done` of `total` units; a change of `phase` is always reported.
    pub(crate) fn update(&mut self, done: u64, total: u64, phase: &str, details: &str) {
        let line = [phase, details].iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join(", ");
        if !self.bar.is_hidden() {
            self.bar.set_length(total);
            self.bar.set_position(done);
            self.bar.set_message(line);
        } else if self.phase != phase || self.reported.is_none_or(|reported| reported.elapsed() >= PLAIN_EVERY) {
            note(format!("{done}/{total} {line}"));
            self.reported = Some(Instant::now());
        }
        phase.clone_into(&mut self.phase);
    }

    /// Prints a line of data without tearing the bar.
    pub(crate) fn say(&self, line: impl Display) {
        self.bar.suspend(|| say(line));
    }
}

/// `part` of `whole` as a percentage.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1} %", 100.0 * part as f64 / whole as f64) }
}

/// The name of a protobuf enum's value as people and JSON see it: `DATASET_STATE_READY` -> `ready`.
pub(crate) fn state_name(value: &str, prefix: &str) -> String {
    value.strip_prefix(prefix).unwrap_or(value).to_lowercase()
}

/// Puts the spec, which travels as JSON in a string, into `value` as an object.
pub(crate) fn unfold_spec(value: &mut serde_json::Value) {
    if let Some(object) = value.as_object_mut()
        && let Some(serde_json::Value::String(text)) = object.remove("spec_json")
    {
        object.insert("spec".to_owned(), serde_json::from_str(&text).unwrap_or(serde_json::Value::Null));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_said_steers_a_terminal() {
        let said = Harmless("http://a/\u{1b}[31mX\u{1b}]0;hi\u{7}\r.jpg\tкошка\n").to_string();
        assert_eq!(said, "http://a/\\u{1b}[31mX\\u{1b}]0;hi\\u{7}\\r.jpg\tкошка\n");
    }

    #[test]
    fn numbers_stand_to_the_right_and_words_to_the_left() {
        let mut table = Table::new(&["outcome", "urls", "share"]);
        table.row(vec!["kept".into(), "1200".into(), percent(1200, 1205)]);
        table.row(vec!["not_found".into(), "5".into(), percent(5, 1205)]);
        assert_eq!(table.lines(), ["OUTCOME    URLS   SHARE", "kept       1200  99.6 %", "not_found     5   0.4 %"]);
    }
}
