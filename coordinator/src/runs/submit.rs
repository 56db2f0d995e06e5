//! New runs: a spec is resolved against its dataset, and perhaps against the run that it starts from, and stored.

use std::sync::Arc;

use proto::ids::IdError;
use proto::manifest::Manifest;
use proto::run_event::RunEvent;
use proto::stored_run::{StartWeights, StoredRun};
use proto::{RunName, RunSpec, Split, Stored, keys, pb};

use super::{Request, Runs, sources};
use crate::datasets::Stage;
use crate::error::Error;
use crate::roster::Run;
use crate::store::{Created, nonce};

impl Runs {
    /// Resolves a spec against the dataset, stores the run, and queues it. Returns its name.
    pub(crate) async fn submit(self: &Arc<Self>, request: pb::SubmitRunRequest) -> Result<String, Error> {
        let pb::SubmitRunRequest { request_id, name, spec_json, from_run, from_step } = request;
        if request_id.is_empty() {
            return Err(Error::Invalid("request_id is empty".to_owned()));
        }
        let mut spec = RunSpec::from_json(&spec_json)?;
        let one = Arc::clone(&self.changing).lock_owned().await;
        if let Some((name, _)) = self.lock().records.iter().find(|(_, record)| record.request_id == request_id) {
            return Ok(name.clone());
        }
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
        let manifest_key = keys::manifest(&dataset.id, version);
        let missing = || Error::NotFound(format!("dataset {:?} has no manifest of version {version}", spec.dataset));
        let json = self.store.get(&manifest_key).await?.ok_or_else(missing)?;
        let manifest = Manifest::from_json(&json).map_err(|e| Error::Local(format!("{manifest_key}: {e}")))?;
        let steps_per_epoch = check(&spec, &manifest)?;
        let start = match from_run.as_str() {
            "" => None,
            from => Some(self.start(from, from_step, &spec, &manifest).await?),
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
        let manifest_sha256 = proto::shard::sha256_hex(&json);
        let dataset = dataset.id.clone();
        let stored = StoredRun {
            format: 1,
            nonce: nonce(),
            request_id,
            dataset,
            manifest_key,
            manifest_sha256,
            steps_per_epoch,
            start,
            traceparent: proto::trace::current(),
            spec,
        };
        let this = Arc::clone(self);
        // A caller that goes away must not cut this in the middle.
        let tail = tokio::spawn(async move {
            let _one = one;
            this.commit(name, stored).await
        });
        tail.await.map_err(|error| Error::Local(error.to_string()))?
    }

    /// Stores a run and queues it. Returns its name.
    async fn commit(&self, name: String, mut stored: StoredRun) -> Result<String, Error> {
        self.term.check(&self.store).await?;
        if let Some(start) = &mut stored.start {
            // Copied, since the other run goes on removing its old checkpoints.
            let folder = keys::start(&name, &stored.nonce);
            for file in start.digests.keys() {
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

    fn free_name(&self, dataset: &str) -> String {
        let inner = self.lock();
        let is_free = |name: &String| !inner.records.contains_key(name) && !inner.deleting.contains_key(name);
        let stem: String = dataset.chars().take(56).collect();
        (1u32..).map(|n| format!("{stem}-{n}")).find(is_free).unwrap_or(stem)
    }

    /// The checkpoint of run `from` to start from: that of `step`, or the newest.
    async fn start(
        &self,
        from: &str,
        step: Option<u64>,
        spec: &RunSpec,
        manifest: &Manifest,
    ) -> Result<StartWeights, Error> {
        let other = self.lock().roster.find(from).cloned();
        let other = other.ok_or_else(|| Error::NotFound(format!("no run to start from is called {from:?}")))?;
        let network = |spec: &RunSpec| (spec.model.arch, spec.model.width);
        if network(&other.spec) != network(spec) {
            let (theirs, width) = network(&other.spec);
            return Err(Error::Invalid(format!(
                "the run to start from, {from:?}, has another network: set model.arch = {} and model.width = {width}",
                serde_json::to_string(&theirs).unwrap_or_default()
            )));
        }
        let found = other.checkpoint(step)?;
        let key = other.manifest_key();
        let theirs = Manifest::from_json(&self.store.need(key).await?);
        let theirs = theirs.map_err(|error| Error::Local(format!("{key}: {error}")))?;
        Ok(StartWeights {
            run: from.to_owned(),
            step: found.step,
            from_classes: theirs.classes.len() as u64,
            classes: manifest.classes.len() as u64,
            key: found.key.clone(),
            digests: found.digests.clone().into_iter().collect(),
        })
    }
}

/// Whether the spec fits the samples (design's rules on steps and shares), and how many steps an epoch then has.
fn check(spec: &RunSpec, manifest: &Manifest) -> Result<u64, Error> {
    let samples = manifest.samples(Split::Train);
    let (batch, lanes) = (u64::from(spec.train.batch), u64::from(spec.ranks.lanes));
    // Rounded to the nearest: an epoch has no short step at its end.
    let steps = (samples + batch / 2) / batch;
    if steps == 0 || samples / (steps * lanes) < 2 {
        return Err(Error::Invalid(format!(
            "train.batch = {batch} with ranks.lanes = {lanes}: the dataset has {samples} training images; \
             each lane needs 2 in each step, and an epoch at least one step"
        )));
    }
    if spec.input.crop > manifest.smallest_side {
        return Err(Error::Invalid(format!(
            "input.crop = {}: the dataset's images are only sure to have {} pixels a side; with resize.mode = \"cover\" and \
             resize.upscale they all have resize.size, and limits.min_side refuses small ones",
            spec.input.crop, manifest.smallest_side
        )));
    }
    Ok(steps)
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
}
