//! `gleaner dataset diff`: what one version of a dataset has that another has not.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::Result;
use proto::manifest::{ManifestShard, Skips};
use proto::rejection::outcome_name;
use proto::{DatasetId, Manifest, OutcomeCounts};
use serde::Serialize;

use super::reader::{DatasetArgs, Reader, samples};
use crate::output::{Format, Table, note, say, say_json};

/// Arguments of `gleaner dataset diff`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    of: DatasetArgs,
    /// The one version
    v1: u32,
    /// The other
    v2: u32,
}

/// A number in the one version and in the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Change {
    pub(crate) from: u64,
    pub(crate) to: u64,
}

/// What became of one class, or of all.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct ClassDiff {
    pub(crate) synset: String,
    pub(crate) name: String,
    /// Samples that count in the other version alone.
    pub(crate) added: u64,
    /// Samples that count in the one version alone.
    pub(crate) removed: u64,
    pub(crate) samples: Change,
    /// Outcomes whose number of URLs has changed.
    outcomes: BTreeMap<String, Change>,
}

/// Two versions compared.
#[derive(Debug, Serialize)]
pub(crate) struct Diff {
    dataset: DatasetId,
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) added: u64,
    pub(crate) removed: u64,
    pub(crate) outcomes: BTreeMap<String, Change>,
    /// Those that have changed.
    pub(crate) classes: Vec<ClassDiff>,
}

/// Compares and prints.
pub(super) async fn run(args: Args) -> Result<()> {
    let reader = Reader::open(&args.of).await?;
    let (one, other) = (reader.manifest(args.v1).await?, reader.manifest(args.v2).await?);
    let moved = moved(&reader, &one, &other).await?;
    let diff = diff(&one, &other, &moved);
    match args.of.cluster.output {
        Format::Json => say_json(&diff),
        Format::Table => {
            lines(&args.of.name, &diff).iter().for_each(say);
            Ok(())
        }
    }
}

/// Samples added and removed, by synset. Only shards that are not the same in both versions are read.
pub(crate) async fn moved(reader: &Reader, one: &Manifest, other: &Manifest) -> Result<HashMap<String, (u64, u64)>> {
    let by_number = |manifest: &Manifest| -> HashMap<u32, ManifestShard> {
        let sound = manifest.shards.iter().filter(|shard| !manifest.is_damaged(shard.shard));
        sound.map(|shard| (shard.shard, shard.clone())).collect()
    };
    let (before, after) = (by_number(one), by_number(other));
    let all: BTreeSet<u32> = before.keys().chain(after.keys()).copied().collect();
    let mut moved = HashMap::<String, (u64, u64)>::new();
    for shard in all {
        let pair = (before.get(&shard), after.get(&shard));
        let digest = |of: Option<&ManifestShard>| of.map(|shard| shard.skips.as_ref().map(|file| file.sha256.clone()));
        let Some(any) = pair.0.or(pair.1).filter(|_| digest(pair.0) != digest(pair.1)) else { continue };
        let skips = async |of: Option<&ManifestShard>| -> Result<Option<Skips>> {
            match of {
                Some(shard) => reader.skips(shard).await.map(Some),
                None => Ok(None),
            }
        };
        let (before, after) = (skips(pair.0).await?, skips(pair.1).await?);
        let rows = match reader.rows(one, any).await {
            Err(error) if one.is_damaged(shard) || other.is_damaged(shard) => {
                note(format!("samples of shard {shard}, which is damaged, are not counted: {error:#}"));
                continue;
            }
            rows => rows?,
        };
        for (ordinal, row) in (0u32..).zip(samples(rows)) {
            let counts = |skips: &Option<Skips>| skips.as_ref().is_some_and(|skips| !skips.contains(ordinal));
            match (counts(&before), counts(&after)) {
                (false, true) => moved.entry(row.synset).or_default().0 += 1,
                (true, false) => moved.entry(row.synset).or_default().1 += 1,
                _ => {}
            }
        }
    }
    Ok(moved)
}

/// Compares two versions, of which is known what `moved`.
pub(crate) fn diff(one: &Manifest, other: &Manifest, moved: &HashMap<String, (u64, u64)>) -> Diff {
    let classes = one.classes.iter().zip(&other.classes).map(|(before, after)| {
        let (added, removed) = moved.get(&after.synset).copied().unwrap_or_default();
        ClassDiff {
            synset: after.synset.clone(),
            name: after.name.clone(),
            added,
            removed,
            samples: Change { from: before.total(), to: after.total() },
            outcomes: changes(&before.outcomes, &after.outcomes),
        }
    });
    let changed = |class: &ClassDiff| class.added + class.removed > 0 || !class.outcomes.is_empty();
    Diff {
        dataset: other.dataset.clone(),
        from: one.version,
        to: other.version,
        added: moved.values().map(|(added, _)| added).sum(),
        removed: moved.values().map(|(_, removed)| removed).sum(),
        outcomes: changes(&one.outcomes, &other.outcomes),
        classes: classes.filter(changed).collect(),
    }
}

fn changes(before: &OutcomeCounts, after: &OutcomeCounts) -> BTreeMap<String, Change> {
    let outcomes = before.iter().chain(after.iter()).map(|(outcome, _)| outcome);
    let change =
        |outcome| (outcome_name(outcome).to_owned(), Change { from: before.of(outcome), to: after.of(outcome) });
    outcomes.map(change).filter(|(_, change)| change.from != change.to).collect()
}

/// For people.
fn lines(name: &str, diff: &Diff) -> Vec<String> {
    let Diff { from, to, added, removed, .. } = diff;
    let mut lines = vec![format!("{name}: version {from} to {to}: {added} samples added, {removed} removed")];
    let signed = |change: &Change| format!("{:+}", change.to as i128 - change.from as i128);
    let versions = [format!("v{from}"), format!("v{to}")];
    if !diff.outcomes.is_empty() {
        let mut table = Table::new(&["synset", "outcome", &versions[0], &versions[1], "change"]);
        let mut rows = |synset: &str, outcomes: &BTreeMap<String, Change>| {
            for (outcome, change) in outcomes {
                let numbers = [change.from.to_string(), change.to.to_string(), signed(change)];
                table.row([synset.to_owned(), outcome.clone()].into_iter().chain(numbers).collect());
            }
        };
        for class in &diff.classes {
            rows(&class.synset, &class.outcomes);
        }
        rows("all", &diff.outcomes);
        lines.push(String::new());
        lines.extend(table.lines());
    }
    if !diff.classes.is_empty() {
        let mut table = Table::new(&["synset", "name", "added", "removed", &versions[0], &versions[1]]);
        for ClassDiff { synset, name, added, removed, samples, .. } in &diff.classes {
            let numbers = [added, removed, &samples.from, &samples.to].map(u64::to_string);
            table.row([synset.clone(), name.clone()].into_iter().chain(numbers).collect());
        }
        lines.push(String::new());
        lines.extend(table.lines());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::Rejection;

    #[test]
    fn counts_that_are_the_same_are_left_out() {
        let before = [(Ok(()), 3), (Err(Rejection::Dns), 2), (Err(Rejection::Timeout), 4)];
        let after = [(Ok(()), 7), (Err(Rejection::Dns), 2)];
        let changes = changes(&before.into_iter().collect(), &after.into_iter().collect());
        let expected = [("kept", Change { from: 3, to: 7 }), ("timeout", Change { from: 4, to: 0 })];
        assert_eq!(changes, expected.map(|(name, change)| (name.to_owned(), change)).into());
    }

    #[test]
    fn the_table_has_every_class_and_outcome_that_changed_and_the_sum() {
        let outcomes = BTreeMap::from([("timeout".to_owned(), Change { from: 4, to: 0 })]);
        let samples = Change { from: 3, to: 7 };
        let (synset, name) = ("n1".to_owned(), "dog".to_owned());
        let class = ClassDiff { synset, name, added: 4, removed: 0, samples, outcomes: outcomes.clone() };
        let diff = Diff {
            dataset: "d-1".parse().expect("an id"),
            from: 1,
            to: 2,
            added: 4,
            removed: 0,
            outcomes,
            classes: vec![class],
        };
        assert_eq!(
            lines("d", &diff),
            [
                "d: version 1 to 2: 4 samples added, 0 removed",
                "",
                "SYNSET  OUTCOME  V1  V2  CHANGE",
                "n1      timeout   4   0      -4",
                "all     timeout   4   0      -4",
                "",
                "SYNSET  NAME  ADDED  REMOVED  V1  V2",
                "n1      dog       4        0   3   7",
            ]
        );
    }
}
