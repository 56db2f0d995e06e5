//! New runs: a spec is resolved against its dataset, and perhaps against the run that it starts from, and stored.

use std::sync::Arc;

use proto::ids::IdError;
use proto::manifest::Manifest;
use proto::run_event::{EventRecord, RunEvent};
use proto::run_spec::Plan;
use proto::stored_run::StoredRun;
use proto::{RunName, RunSpec, Split, Stored, keys, pb};

use super::weights::Sent;
use super::{Request, Runs, sources};
use crate::datasets::Stage;
use crate::error::Error;
use crate::roster::Run;
use crate::store::{Created, nonce, wall_millis};

impl Runs {
    /// Resolves a spec against the dataset, stores the run, and queues it. Returns its name.
    pub(crate) async fn submit(
        self: &Arc<Self>,
        request: pb::SubmitRunRequest,
        sent: Option<Sent>,
    ) -> Result<String, Error> {
        let one = Arc::clone(&self.changing).lock_owned().await;
        if let Some(name) = self.by_request(&request.request_id) {
            return Ok(name);
        }
        let (name, stored) = self.resolve(request, sent).await?;
        let this = Arc::clone(self);
        // A caller that goes away must not cut this in the middle.
        let tail = tokio::spawn(async move {
            let _one = one;
            this.commit(name, stored).await
        });
        tail.await?
    }

    /// The run that would be submitted.
    pub(crate) async fn preview(&self, request: pb::SubmitRunRequest) -> Result<pb::Run, Error> {
        let (run, stored) = self.resolve(request, None).await?;
        let StoredRun { spec, steps_per_epoch, request_id, start, .. } = stored;
        let start = start.map(|start| start.to_string());
        let event = RunEvent::Submitted { request_id, start };
        let record =
            EventRecord { format: 1, n: 1, term: self.term.number(), nonce: nonce(), at_millis: wall_millis(), event };
        Ok(pb::Run {
            run,
            spec_json: spec.to_json(),
            dataset: spec.dataset.clone(),
            manifest_version: spec.manifest.unwrap_or(0),
            epochs: spec.train.epochs.into(),
            steps_per_epoch,
            events: vec![String::from_utf8_lossy(&record.to_json()).into_owned()],
            ..pb::Run::default()
        })
    }

    /// The name of a run, and the run with all that its spec left open.
    pub(super) async fn resolve(
        &self,
        request: pb::SubmitRunRequest,
        sent: Option<Sent>,
    ) -> Result<(String, StoredRun), Error> {
        let pb::SubmitRunRequest { request_id, name, spec_json, from_run, from_step, from_file, .. } = request;
        if request_id.is_empty() {
            return Err(Error::Invalid("request_id is empty".to_owned()));
        }
        let mut spec = RunSpec::from_json(&spec_json)?;
        let (dataset, _) = self.datasets.find(&spec.dataset)?;
        let Some(latest) = dataset.trainable() else {
            let why = match &dataset.stage {
                Stage::Failed(reason) => format!("has failed: {reason}"),
                _ => "has no manifest yet: wait until it is ready".to_owned(),
            };
            return Err(Error::Precondition(format!("dataset {:?} {why}", spec.dataset)));
        };
        if dataset.spec.unlabelled {
            let why = "has no classes: its list was taken with --unlabelled, so that nothing can be trained on it";
            return Err(Error::Precondition(format!("dataset {:?} {why}", spec.dataset)));
        }
        let version = *spec.manifest.get_or_insert(latest.version);
        spec.plan.get_or_insert(Plan::NEWEST);
        let manifest_key = keys::manifest(&dataset.id, version);
        let missing = || Error::NotFound(format!("dataset {:?} has no manifest of version {version}", spec.dataset));
        let json = self.store.get(&manifest_key).await?.ok_or_else(missing)?;
        // That of a large dataset has many megabytes: others are not to wait for it.
        let read = tokio::task::spawn_blocking(move || (Manifest::from_json(&json), proto::shard::sha256_hex(&json)));
        let (manifest, manifest_sha256) = read.await?;
        let manifest = manifest.map_err(|e| Error::Local(format!("{manifest_key}: {e}")))?;
        let steps_per_epoch = check(&spec, &manifest)?;
        let nonce = sent.as_ref().map_or_else(nonce, |sent| sent.nonce.clone());
        let start = match (from_run.as_str(), sent) {
            ("", sent) => sent.map(|sent| sent.start(from_file, &manifest)),
            (from, None) => Some(self.start_from_run(from, from_step, &spec, &manifest).await?),
            (_, Some(_)) => {
                return Err(Error::Invalid("a run begins with the weights of a run or of a file".to_owned()));
            }
        };
        let name = match name.as_str() {
            "" => self.free_name(&spec.dataset),
            given => {
                let name: Result<RunName, IdError> = given.parse();
                name.map_err(|error| Error::Invalid(format!("name: {error}")))?.to_string()
            }
        };
        let (taken, deleting) = {
            let inner = self.lock();
            (inner.records.contains_key(&name), inner.deleting.contains_key(&name))
        };
        if taken || deleting {
            let why = if deleting { " and is still being deleted: try again in some seconds" } else { " already" };
            return Err(Error::Exists(format!("a run is called {name:?}{why}")));
        }
        let dataset = dataset.id.clone();
        let stored = StoredRun {
            format: 1,
            nonce,
            request_id,
            dataset,
            manifest_key,
            manifest_sha256,
            steps_per_epoch,
            start,
            traceparent: proto::trace::current(),
            spec,
        };
        Ok((name, stored))
    }

    /// Stores a run and queues it. Returns its name.
    async fn commit(&self, name: String, mut stored: StoredRun) -> Result<String, Error> {
        self.term.check(&self.store).await?;
        if let Some(start) = &mut stored.start {
            // Copied, since the other run goes on removing its old checkpoints. A file that was sent is where it
            // belongs, unless another run has got the name meanwhile.
            let folder = keys::start(&name, &stored.nonce);
            for file in start.digests.keys().filter(|_| start.key != folder) {
                self.store.copy(&format!("{}/{file}", start.key), &format!("{folder}/{file}")).await?;
            }
            start.key = folder;
        }
        // From here on a coordinator that recovers it queues it, and a repeated request finds it.
        if let Created::Lost(theirs) = self.store.create(&keys::run_spec(&name), &stored).await? {
            // It may be an earlier try of this request, whose answer from the store was lost.
            let theirs = StoredRun::from_json(&theirs).ok();
            let same = theirs.filter(|theirs| theirs.request_id == stored.request_id);
            stored = same.ok_or_else(|| Error::Exists(format!("a run is called {name:?} already")))?;
        }
        let sources = sources(&stored);
        let StoredRun { spec, request_id, steps_per_epoch, start, .. } = stored;
        let run = Box::new(Run::recovered(self.now(), &name, spec, sources, steps_per_epoch, &[]));
        let start = start.map(|start| start.to_string());
        let submitted = RunEvent::Submitted { request_id: request_id.clone(), start };
        self.request(&name, Request::Submit { run, submitted, request_id }).await?;
        Ok(name)
    }

    /// The run that this request has made.
    pub(crate) fn by_request(&self, request_id: &str) -> Option<String> {
        let inner = self.lock();
        inner.records.iter().find(|(_, record)| record.request_id == request_id).map(|(name, _)| name.clone())
    }

    pub(super) fn free_name(&self, dataset: &str) -> String {
        let inner = self.lock();
        let is_free = |name: &String| !inner.records.contains_key(name) && !inner.deleting.contains_key(name);
        let stem: String = dataset.chars().take(56).collect();
        (1u32..).map(|n| format!("{stem}-{n}")).find(is_free).unwrap_or(stem)
    }
}

/// Steps of an epoch, rounded to the nearest: it has no short step at its end.
fn steps(samples: u64, batch: u64) -> u64 {
    (samples + batch / 2) / batch
}

/// Whether each lane has at least so many samples in each step, of which there are some.
fn fits(samples: u64, batch: u64, lanes: u64, least: u64) -> bool {
    let steps = steps(samples, batch);
    steps > 0 && samples / (steps * lanes) >= least
}

/// The batch and the number of lanes next to those that do not fit.
fn what_would_do(samples: u64, batch: u64, lanes: u64, least: u64) -> String {
    let larger = (batch..=samples).find(|batch| fits(samples, *batch, lanes, least));
    let batch_of =
        larger.or_else(|| (1..batch.min(samples + 1)).rev().find(|batch| fits(samples, *batch, lanes, least)));
    let lanes_of = (1..lanes).rev().find(|lanes| fits(samples, batch, *lanes, least));
    let values = [("train.batch", batch_of), ("ranks.lanes", lanes_of)].into_iter();
    let values: Vec<String> = values.filter_map(|(name, value)| Some(format!("{name} = {}", value?))).collect();
    match values.is_empty() {
        true => "they are too few".to_owned(),
        false => format!("{} would do", values.join(" or ")),
    }
}

/// Whether the spec fits the samples (design's rules on steps and shares), and how many steps an epoch then has.
fn check(spec: &RunSpec, manifest: &Manifest) -> Result<u64, Error> {
    let samples = manifest.samples(Split::Train);
    let (batch, lanes) = (u64::from(spec.train.batch), u64::from(spec.ranks.lanes));
    // Of two normalised values one is as far above 0 as the other is below, whatever they were.
    let least = if spec.model.is_normalised() { 3 } else { 2 };
    if !fits(samples, batch, lanes, least) {
        return Err(Error::Invalid(format!(
            "train.batch = {batch} with ranks.lanes = {lanes}: the dataset has {samples} training images; \
             each lane needs {least} in each step, and an epoch at least one step; {}",
            what_would_do(samples, batch, lanes, least)
        )));
    }
    if spec.input.crop > manifest.smallest_side {
        return Err(Error::Invalid(format!(
            "input.crop = {}: the dataset's images are only sure to have {} pixels a side; with resize.mode = \"cover\" and \
             resize.upscale they all have resize.size, and limits.min_side refuses small ones",
            spec.input.crop, manifest.smallest_side
        )));
    }
    Ok(steps(samples, batch))
}

impl Run {
    /// The checkpoint of this step, or the newest.
    pub(super) fn checkpoint(&self, step: Option<u64>) -> Result<&pb::Checkpointed, Error> {
        let found = self.checkpoints.iter().rfind(|made| step.is_none_or(|step| made.step == step));
        found.ok_or_else(|| {
            let there: Vec<String> = self.checkpoints.iter().map(|checkpoint| checkpoint.step.to_string()).collect();
            let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
            let wanted = step.map_or(String::new(), |step| format!(" at step {step}"));
            Error::NotFound(format!("run {:?} has no checkpoint{wanted}; there are: {there}", self.name))
        })
    }

    /// Whether it can be continued to so many epochs in all.
    pub(super) fn check_epochs(&self, epochs: u32) -> Result<(), Error> {
        let mut longer = self.spec.clone();
        longer.train.epochs = epochs;
        let RunSpec { train, .. } = RunSpec::from_json(&longer.to_json())?;
        match u64::from(train.epochs) * self.steps_per_epoch > self.step {
            true => Ok(()),
            false => {
                let done = self.step as f64 / self.steps_per_epoch as f64;
                Err(Error::Invalid(format!("epochs = {epochs}: run {:?} has done {done:.1}: choose more", self.name)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_for_its_batch_says_which_would_do() {
        for (samples, batch, lanes, said) in [
            (47, 16, 8, "train.batch = 32 or ranks.lanes = 5 would do"),
            (125, 1000, 8, "train.batch = 125 would do"),
            (1_000_000, 16, 8, "train.batch = 25 or ranks.lanes = 5 would do"),
            (20, 16, 8, "ranks.lanes = 6 would do"),
            (2, 16, 8, "they are too few"),
        ] {
            let found = what_would_do(samples, batch, lanes, 3);
            assert_eq!(found, said, "{samples} images");
            assert!(!fits(samples, batch, lanes, 3), "{samples} images");
        }
    }
}
