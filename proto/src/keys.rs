//! Object keys: the one place where they are built and parsed. The store's layout is:
//!
//! ```text
//! cluster.json                                           Create, once: the cluster's id
//! coordinator/terms/000009.json                          Create at start: this coordinator's term
//! coordinator/handovers/000009.json                      what that coordinator leaves to the next one
//! datasets/<dataset>/spec.json                           Create: what the dataset is; once deleted, tombstone.json too
//! datasets/<dataset>/slices/000007.tsv.zst               the URLs of shard 7
//! datasets/<dataset>/catalog/000001.json                 Create = the commit of round 1
//! datasets/<dataset>/control/000001.json                 Create: what somebody decided: pause, resume, finish, priority
//! datasets/<dataset>/shards/<split>/000007-9.2.tar       attempt 9.2's samples of that split
//! datasets/<dataset>/outcomes/000007-9.2.parquet         one row per URL
//! datasets/<dataset>/index/000007.json                   Create = the commit of shard 7
//! datasets/<dataset>/manifests/000003.json               Create = version 3 of the manifest
//! datasets/<dataset>/manifests/000003-<nonce>/skips/000007.bits  which of shard 7's samples version 3 skips
//! datasets/<dataset>/manifests/000003-<nonce>/findings/000007.parquet  why, and which of them look like another one
//! datasets/<dataset>/manifests/000003-<nonce>/gists.json  which objects hold the gists of version 3's shards
//! datasets/<dataset>/manifests/000003-<nonce>/gists/000002-<sha256>.zst  gists of some shards of round 2
//! runs/<run>/spec.json                                   Create: the resolved run spec; tombstone.json beside it once deleted
//! runs/<run>/events/000012.json                          Create: the run's history, written by the coordinator alone
//! runs/<run>/ledger/<generation>-<n>.json                what was really trained on
//! runs/<run>/metrics/<generation>-<n>.jsonl              points of the learning curve
//! runs/<run>/curve/<n>.json                              a summary of the first n objects of points
//! runs/<run>/logs/<generation>-<rank>-<n>.log            what a rank said
//! runs/<run>/checkpoints/<step>-<generation>-<nonce>/    exists once an event names it with its digests
//! runs/<run>/start/<nonce>/                              another run's weights, which this one begins with
//! runs/<run>/model/<generation>-<nonce>/                 the trained model, once an event names it
//! imports/...                                            what people put there for `dataset import`: nothing here writes it
//! ```
//!
//! `<dataset>` is `<name>-<uid>`: a name that is deleted and made again never meets its old objects.

use crate::Split;
use crate::ids::{Attempt, DatasetId, ShardId};

/// The cluster's identity.
pub const CLUSTER: &str = "cluster.json";
/// Folder of the coordinators' terms.
pub const TERMS: &str = "coordinator/terms";
/// Folder of what coordinators leave to those that follow them.
pub const HANDOVERS: &str = "coordinator/handovers";
/// Folder of all datasets.
pub const DATASETS: &str = "datasets";
/// Folder of all runs.
pub const RUNS: &str = "runs";
/// Folder of the pictures that datasets may be made of.
pub const IMPORTS: &str = "imports";

/// A text that is not what a key must be.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is no {what}")]
pub struct KeyError {
    what: &'static str,
    text: String,
}

/// `coordinator/terms/000009.json`
pub fn term(term: u64) -> String {
    format!("{TERMS}/{term:06}.json")
}

/// `coordinator/handovers/000009.json`
pub fn handover(term: u64) -> String {
    format!("{HANDOVERS}/{term:06}.json")
}

/// `datasets/<dataset>`
pub fn dataset(dataset: &DatasetId) -> String {
    format!("{DATASETS}/{dataset}")
}

/// `datasets/<dataset>/spec.json`
pub fn dataset_spec(dataset: &DatasetId) -> String {
    format!("{DATASETS}/{dataset}/spec.json")
}

/// `datasets/<dataset>/tombstone.json`
pub fn tombstone(dataset: &DatasetId) -> String {
    format!("{DATASETS}/{dataset}/tombstone.json")
}

/// `datasets/<dataset>/slices/000007.tsv.zst`
pub fn slice(of: &ShardId) -> String {
    format!("{}/{:06}.tsv.zst", slices(&of.dataset), of.shard)
}

/// `datasets/<dataset>/slices`
pub fn slices(dataset: &DatasetId) -> String {
    format!("{DATASETS}/{dataset}/slices")
}

/// `datasets/<dataset>/control`
pub fn controls(dataset: &DatasetId) -> String {
    format!("{DATASETS}/{dataset}/control")
}

/// `datasets/<dataset>/control/000001.json`
pub fn control(dataset: &DatasetId, number: u32) -> String {
    format!("{}/{number:06}.json", controls(dataset))
}

/// `datasets/<dataset>/catalog`
pub fn rounds(dataset: &DatasetId) -> String {
    format!("{DATASETS}/{dataset}/catalog")
}

/// `datasets/<dataset>/catalog/000001.json`
pub fn round(dataset: &DatasetId, round: u32) -> String {
    format!("{}/{round:06}.json", rounds(dataset))
}

/// `datasets/<dataset>/shards/<split>/000007-9.2.tar`
pub fn tar(of: &ShardId, split: Split, attempt: Attempt) -> String {
    format!("{}/{:06}-{attempt}.tar", tars(&of.dataset, split), of.shard)
}

/// `datasets/<dataset>/shards/<split>`
pub fn tars(dataset: &DatasetId, split: Split) -> String {
    format!("{DATASETS}/{dataset}/shards/{split}")
}

/// `datasets/<dataset>/outcomes/000007-9.2.parquet`
pub fn outcomes(of: &ShardId, attempt: Attempt) -> String {
    format!("{}/{:06}-{attempt}.parquet", outcomes_of(&of.dataset), of.shard)
}

/// `datasets/<dataset>/outcomes`
pub fn outcomes_of(dataset: &DatasetId) -> String {
    format!("{DATASETS}/{dataset}/outcomes")
}

/// `datasets/<dataset>/index`
pub fn indexes(dataset: &DatasetId) -> String {
    format!("{DATASETS}/{dataset}/index")
}

/// `datasets/<dataset>/index/000007.json`
pub fn index(of: &ShardId) -> String {
    format!("{}/{:06}.json", indexes(&of.dataset), of.shard)
}

/// `datasets/<dataset>/manifests`
pub fn manifests(dataset: &DatasetId) -> String {
    format!("{DATASETS}/{dataset}/manifests")
}

/// `datasets/<dataset>/manifests/000003.json`
pub fn manifest(dataset: &DatasetId, version: u32) -> String {
    format!("{}/{version:06}.json", manifests(dataset))
}

/// `datasets/<dataset>/manifests/000003-<nonce>/skips/000007.bits`. The nonce is that of the manifest that names it: of
/// two coordinators that make a version at once, neither overwrites what the other's manifest names. (Older manifests
/// name keys without one.)
pub fn skips(of: &ShardId, version: u32, nonce: &str) -> String {
    format!("{}/skips/{:06}.bits", beside_manifest(&of.dataset, version, nonce), of.shard)
}

/// `datasets/<dataset>/manifests/000003-<nonce>/findings/000007.parquet`, likewise.
pub fn findings(of: &ShardId, version: u32, nonce: &str) -> String {
    format!("{}/findings/{:06}.parquet", beside_manifest(&of.dataset, version, nonce), of.shard)
}

/// `datasets/<dataset>/manifests/000003-<nonce>`
pub fn beside_manifest(dataset: &DatasetId, version: u32, nonce: &str) -> String {
    format!("{}/{version:06}-{nonce}", manifests(dataset))
}

/// `datasets/<dataset>/manifests/000003-<nonce>/gists.json`
pub fn gist_list(dataset: &DatasetId, version: u32, nonce: &str) -> String {
    format!("{}/gists.json", beside_manifest(dataset, version, nonce))
}

/// `datasets/<dataset>/manifests/000003-<nonce>/gists`
pub fn gists_of(dataset: &DatasetId, version: u32, nonce: &str) -> String {
    format!("{}/gists", beside_manifest(dataset, version, nonce))
}

/// `datasets/<dataset>/manifests/000003-<nonce>/gists/000002-<sha256>.zst`, with the digest of its bytes: it can be
/// told whole also where no list names it.
pub fn gists(dataset: &DatasetId, version: u32, nonce: &str, round: u32, sha256: &str) -> String {
    format!("{}/{round:06}-{sha256}.zst", gists_of(dataset, version, nonce))
}

/// The round and the digest of `.../gists/000002-<sha256>.zst`.
pub fn gists_named(key: &str) -> Result<(u32, &str), KeyError> {
    let parse = || {
        let (folder, file) = key.rsplit_once('/')?;
        let (round, sha256) = file.strip_suffix(".zst")?.split_once('-')?;
        folder.ends_with("/gists").then_some((round.parse().ok()?, sha256))
    };
    parse().ok_or_else(|| KeyError { what: "key of gists", text: key.to_owned() })
}

/// `runs/<run>`
pub fn run(run: &str) -> String {
    format!("{RUNS}/{run}")
}

/// `runs/<run>/tombstone.json`
pub fn run_tombstone(run: &str) -> String {
    format!("{RUNS}/{run}/tombstone.json")
}

/// `runs/<run>/spec.json`
pub fn run_spec(run: &str) -> String {
    format!("{RUNS}/{run}/spec.json")
}

/// `runs/<run>/events`
pub fn events(run: &str) -> String {
    format!("{RUNS}/{run}/events")
}

/// `runs/<run>/events/000012.json`
pub fn event(run: &str, n: u64) -> String {
    format!("{}/{n:06}.json", events(run))
}

/// `runs/<run>/ledger`
pub fn ledgers(run: &str) -> String {
    format!("{RUNS}/{run}/ledger")
}

/// `runs/<run>/ledger/<generation>-<n>.json`
pub fn ledger(run: &str, generation: u64, n: u64) -> String {
    format!("{}/{generation:06}-{n:06}.json", ledgers(run))
}

/// `runs/<run>/curve`
pub fn curves(run: &str) -> String {
    format!("{RUNS}/{run}/curve")
}

/// `runs/<run>/curve/<n>.json`
pub fn curve(run: &str, n: usize) -> String {
    format!("{}/{n:08}.json", curves(run))
}

/// `runs/<run>/metrics`
pub fn metrics_of(run: &str) -> String {
    format!("{RUNS}/{run}/metrics")
}

/// `runs/<run>/metrics/<generation>-<n>.jsonl`
pub fn metrics(run: &str, generation: u64, n: u64) -> String {
    format!("{}/{generation:06}-{n:06}.jsonl", metrics_of(run))
}

/// `runs/<run>/logs`
pub fn logs_of(run: &str) -> String {
    format!("{RUNS}/{run}/logs")
}

/// `runs/<run>/logs/<generation>-<rank>-<n>.log`
pub fn logs(run: &str, generation: u64, rank: u32, n: u64) -> String {
    format!("{}/{generation:06}-{rank:04}-{n:06}.log", logs_of(run))
}

/// `runs/<run>/checkpoints/<step>-<generation>-<nonce>`
pub fn checkpoint(run: &str, step: u64, generation: u64, nonce: &str) -> String {
    format!("{RUNS}/{run}/checkpoints/{step:08}-{generation:06}-{nonce}")
}

/// `runs/<run>/checkpoints`
pub fn checkpoints(run: &str) -> String {
    format!("{RUNS}/{run}/checkpoints")
}

/// Step and generation of `runs/<run>/checkpoints/<step>-<generation>-<nonce>`, or of a file in it.
pub fn checkpoint_of(run: &str, key: &str) -> Result<(u64, u64), KeyError> {
    let parse = || {
        let folder = key.strip_prefix(&checkpoints(run))?.strip_prefix('/')?;
        let mut parts = folder.split('/').next()?.split('-');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    };
    parse().ok_or_else(|| KeyError { what: "key of a checkpoint", text: key.to_owned() })
}

/// `runs/<run>/start/<nonce>`
pub fn start(run: &str, nonce: &str) -> String {
    format!("{RUNS}/{run}/start/{nonce}")
}

/// `runs/<run>/model/<generation>-<nonce>`
pub fn model(run: &str, generation: u64, nonce: &str) -> String {
    format!("{RUNS}/{run}/model/{generation:06}-{nonce}")
}

/// The number that a key's last part begins with: `.../events/000012.json` -> 12, `.../slices/000007.tsv.zst` -> 7.
pub fn number(key: &str) -> Result<u64, KeyError> {
    let file = key.rsplit('/').next().unwrap_or(key);
    let digits = file.find(|c: char| !c.is_ascii_digit()).map_or(file, |end| &file[..end]);
    digits.parse().map_err(|_| KeyError { what: "numbered key", text: key.to_owned() })
}

/// The shard and attempt of `.../000007-9.2.tar` or `.../000007-9.2.parquet`.
pub fn attempt_of(key: &str) -> Result<(u32, Attempt), KeyError> {
    let parse = || {
        let file = key.rsplit('/').next()?;
        let (stem, _) = file.rsplit_once('.')?;
        let (shard, attempt) = stem.split_once('-')?;
        Some((shard.parse().ok()?, attempt.parse().ok()?))
    };
    parse().ok_or_else(|| KeyError { what: "key of an attempt", text: key.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keys_are_parsed_back(shard: u32, term: u64, n: u64) {
            let attempt = Attempt { term, n };
            let of = "birds-1".parse::<DatasetId>().expect("an id").shard(shard);
            for key in [tar(&of, Split::Train, attempt), outcomes(&of, attempt)] {
                prop_assert_eq!(attempt_of(&key).expect("built above"), (shard, attempt));
            }
            prop_assert_eq!(number(&slice(&of)).expect("built above"), u64::from(shard));
            let gists = gists(&of.dataset, shard, "ab12", shard, "00ff");
            prop_assert_eq!(gists_named(&gists).expect("built above"), (shard, "00ff"));
            prop_assert_eq!(number(&event("r", n)).expect("built above"), n);
        }
    }

    #[test]
    fn a_checkpoint_tells_its_step_and_generation() {
        let folder = checkpoint("r", 120, 3, "ab12");
        assert_eq!(checkpoint_of("r", &folder).expect("built above"), (120, 3));
        assert_eq!(checkpoint_of("r", &format!("{folder}/state.json")).expect("built above"), (120, 3));
        assert!(checkpoint_of("r", &start("r", "ab12")).is_err());
    }
}
