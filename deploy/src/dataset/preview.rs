//! How a list was understood, and what a dataset of it would be.

use anyhow::Result;
use proto::pb::create_dataset_request::Start;
use proto::pb::{CreateDatasetResponse, ListRow};
use proto::{DatasetSpec, ImageFormat, Resize, ResizeMode};

use super::NameArgs;
use crate::output::{Format, Table, note, say, say_json};

/// Rows that are shown.
const ROWS: usize = 3;
/// Classes that are shown.
const CLASSES: usize = 20;
/// Of a photo's whole way from a response to its tar, as measured on photos of 500 pixels.
const CPU_SECONDS: f64 = 0.002;
/// Characters of a cell.
const WIDTH: usize = 60;

/// Says how the lists were understood.
pub(super) fn show(round: &CreateDatasetResponse) {
    for understood in &round.understood {
        note(format!("read as: {understood}"));
    }
    if round.preview.is_empty() {
        return;
    }
    let columns = round.preview.iter().any(|row| !row.columns.is_empty());
    let mut table = Table::new(if columns { &["class", "url", "columns"] } else { &["class", "url"] });
    for ListRow { synset, url, columns: kept } in round.preview.iter().take(ROWS) {
        let cells = [synset, url].into_iter().chain(columns.then_some(kept));
        table.row(cells.map(|cell| short(cell)).collect());
    }
    table.lines().iter().for_each(note);
}

fn short(text: &str) -> String {
    match text.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// Says what the dataset would be; `summary` is that in one line.
pub(super) fn report(of: &NameArgs, start: &Start, round: &CreateDatasetResponse, summary: &str) -> Result<()> {
    for example in &round.bad_line_examples {
        note(format!("bad line: {example}"));
    }
    if of.cluster.output == Format::Json {
        return say_json(round);
    }
    let spec = DatasetSpec::from_json(&start.spec_json)?;
    let mut classes: Vec<(&String, &u64)> = round.urls_per_class.iter().collect();
    classes.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
    let mut table = Table::new(&["class", "urls"]);
    for (synset, urls) in classes.iter().take(CLASSES) {
        table.row(vec![(*synset).clone(), urls.to_string()]);
    }
    table.say();
    if classes.len() > CLASSES {
        say(format!("and {} classes more", classes.len() - CLASSES));
    }
    say(summary);
    say(disk(&spec.resize, round.urls));
    say(time(&spec, round));
    say("nothing was created (--dry-run)");
    Ok(())
}

/// An estimate of what the pictures need, and what it is made from.
fn disk(resize: &Resize, urls: u64) -> String {
    let Some(picture) = picture_bytes(resize) else {
        return "disk: unknown, since pictures keep their size".to_owned();
    };
    let gigabytes = urls as f64 * picture / 1e9;
    format!(
        "disk: about {gigabytes:.2} GB if every URL still gives its picture, of {:.0} kB each as photos of {} pixels have; \
         of old lists about half are gone",
        picture / 1e3,
        resize.size
    )
}

/// An estimate of how long it takes at the least, and what it is made from.
fn time(spec: &DatasetSpec, round: &CreateDatasetResponse) -> String {
    let work = span(round.urls as f64 * CPU_SECONDS);
    let cores = format!("{work} of a worker's core ({:.0} ms a picture)", CPU_SECONDS * 1e3);
    match &round.slowest_site {
        Some(site) if !spec.files => format!(
            "time: at least {}, for {} URLs of {} at {} a second; and {cores}",
            span(site.urls as f64 / site.requests_per_second),
            site.urls,
            site.site,
            site.requests_per_second
        ),
        _ => format!("time: about {cores}"),
    }
}

/// Seconds as people say them.
fn span(seconds: f64) -> String {
    match seconds {
        ..1.0 => "a second".to_owned(),
        ..100.0 => format!("{seconds:.0} s"),
        ..6_000.0 => format!("{:.0} min", seconds / 60.0),
        ..180_000.0 => format!("{:.1} h", seconds / 3600.0),
        _ => format!("{:.1} days", seconds / 86_400.0),
    }
}

/// Of a photo as it is stored, with its metadata. Measured on photos at 256 pixels: 0.46 bytes a pixel as
/// JPEG of quality 95, 1.67 as PNG.
fn picture_bytes(resize: &Resize) -> Option<f64> {
    let per_pixel = match resize.format {
        ImageFormat::Jpg => 0.46,
        ImageFormat::Png => 1.67,
    };
    // Of photos whose sides are 4 to 3.
    let sides = match resize.mode {
        ResizeMode::None => return None,
        ResizeMode::Cover | ResizeMode::Pad => 1.0,
        ResizeMode::Fit => 0.75,
        ResizeMode::KeepRatio => 1.33,
    };
    let size = f64::from(resize.size);
    Some(size * size * sides * per_pixel + 2048.0)
}
