//! Weights that a run begins with: of another run's checkpoint, or of a file that the submitter sends.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use proto::network::Network;
use proto::stored_run::{StartWeights, StoredRun};
use proto::weights::{self, Head};
use proto::{Manifest, RunSpec, Stored, keys, pb};
use sha2::{Digest, Sha256};
use tonic::Streaming;

use super::Runs;
use crate::error::Error;

/// The file of a folder of weights, as checkpoints have it.
const FILE: &str = "state.safetensors";

/// A sender that is silent for so long has lost its file.
const IDLE: Duration = Duration::from_secs(600);

/// Beside the tensors that a network has a file may have so many bytes of others, and tensors may be of numbers of 8
/// bytes.
const ROOM: u64 = 64 << 20;

/// Weights of a file, in the store.
pub(crate) struct Sent {
    /// The nonce of the run that is to have them, which is in their folder.
    pub(crate) nonce: String,
    folder: String,
    digest: String,
    head: Head,
}

impl Runs {
    /// Takes the file that follows a request for a run, and stores it where a run of that name would have it. What is
    /// not submitted in the end is garbage there.
    pub(crate) async fn receive_weights(
        &self,
        request: &pb::SubmitRunRequest,
        stream: &mut Streaming<pb::SubmitRunWithWeightsRequest>,
    ) -> Result<Sent, Error> {
        // Whatever else is wrong is said before the file is sent.
        let (name, StoredRun { spec, .. }) = self.resolve(request.clone(), None).await?;
        let nonce = crate::store::nonce();
        let folder = keys::start(&name, &nonce);
        let of = |what: String| Error::Invalid(format!("the file {:?}: {what}", request.from_file));
        let mut body = Body { stream, buffer: BytesMut::new() };
        let first = body.take(weights::LENGTH).await?.ok_or_else(|| of("is empty".to_owned()))?;
        let length = Head::length(first[..].try_into().unwrap_or_default()).map_err(of)?;
        let json = body.take(length as usize).await?.ok_or_else(|| of("has no whole head".to_owned()))?;
        let head = Head::parse(&json).map_err(of)?;
        let network = Network::new(&spec.model, 1, spec.input.crop);
        network.takes(&head.shapes).map_err(|what| of(misfit(&what)))?;
        let numbers: u64 = head.shapes.values().map(|shape| shape.iter().product::<u64>()).sum();
        if head.bytes > 8 * numbers + ROOM {
            return Err(of(format!("has {} bytes, more than its {numbers} numbers need", head.bytes)));
        }
        let mut upload = self.store.upload(&format!("{folder}/{FILE}")).await?;
        let (mut digest, mut left) = (Sha256::new(), head.bytes);
        let mut next = Some([first, json].concat().into());
        let sent = async {
            while let Some(bytes) = next {
                let bytes: Bytes = bytes;
                left = left
                    .checked_sub(bytes.len() as u64)
                    .ok_or_else(|| of("is longer than its head says".to_owned()))?;
                digest.update(&bytes);
                upload.push(bytes).await?;
                next = body.next().await?;
            }
            if left > 0 { Err(of(format!("ends {left} bytes too early"))) } else { Ok(()) }
        };
        if let Err(error) = sent.await {
            upload.abort().await;
            return Err(error);
        }
        upload.finish().await?;
        Ok(Sent { nonce, folder, digest: hex::encode(digest.finalize()), head })
    }

    /// The checkpoint of run `from` to start from: that of `step`, or the newest.
    pub(super) async fn start_from_run(
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
        let of_crop = |crop| Network::new(&spec.model, 1, crop);
        let theirs = other.spec.input.crop;
        if of_crop(theirs) != of_crop(spec.input.crop) {
            return Err(Error::Invalid(format!(
                "input.crop = {} makes another network than the {theirs} of the run to start from, {from:?}: set input.crop = {theirs}",
                spec.input.crop
            )));
        }
        let found = other.checkpoint(step)?;
        let key = other.manifest_key();
        let theirs = Manifest::from_json(&self.store.need(key).await?);
        let theirs = theirs.map_err(|error| Error::Local(format!("{key}: {error}")))?;
        let classes: Vec<String> = theirs.classes.iter().map(|class| class.synset.clone()).collect();
        Ok(StartWeights {
            run: from.to_owned(),
            step: found.step,
            file: None,
            from_classes: classes.len() as u64,
            classes: manifest.classes.len() as u64,
            rows: Some(rows(manifest, &classes)),
            key: found.key.clone(),
            digests: found.digests.clone().into_iter().collect(),
        })
    }
}

impl Sent {
    /// As a run of this dataset begins with them.
    pub(super) fn start(self, file: String, manifest: &Manifest) -> StartWeights {
        let Self { folder, digest, head, .. } = self;
        StartWeights {
            run: String::new(),
            step: 0,
            file: Some(file),
            from_classes: head.classes.len() as u64,
            classes: manifest.classes.len() as u64,
            rows: Some(rows(manifest, &head.classes)),
            key: folder,
            digests: BTreeMap::from([(FILE.to_owned(), digest)]),
        }
    }
}

fn rows(manifest: &Manifest, theirs: &[String]) -> Vec<Option<u32>> {
    weights::rows(manifest.classes.iter().map(|class| class.synset.as_str()), theirs)
}

fn misfit(what: &str) -> String {
    format!(
        "{what}: its weights are those of another network; model.arch = \"alexnet\" at input.crop = 224 is torchvision's"
    )
}

/// The bytes of the file.
struct Body<'a> {
    stream: &'a mut Streaming<pb::SubmitRunWithWeightsRequest>,
    buffer: BytesMut,
}

impl Body<'_> {
    /// The next bytes, as they come.
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        use pb::submit_run_with_weights_request::Part;
        if self.buffer.has_remaining() {
            return Ok(Some(self.buffer.split().freeze()));
        }
        let message = tokio::time::timeout(IDLE, self.stream.message()).await;
        let message = message.map_err(|_| Error::Aborted("nothing was sent for ten minutes".to_owned()))?;
        match message.map_err(|status| Error::Aborted(status.message().to_owned()))?.map(|message| message.part) {
            None => Ok(None),
            Some(Some(Part::Weights(bytes))) => Ok(Some(bytes)),
            Some(_) => Err(Error::Invalid("after `start` come `weights` alone".to_owned())),
        }
    }

    /// Exactly so many bytes, or None if there are fewer.
    async fn take(&mut self, count: usize) -> Result<Option<Bytes>, Error> {
        let mut taken = BytesMut::new();
        while taken.len() < count {
            let Some(mut more) = self.next().await? else { return Ok(None) };
            let own = more.split_to(more.len().min(count - taken.len()));
            taken.extend_from_slice(&own);
            self.buffer.extend_from_slice(&more);
        }
        Ok(Some(taken.freeze()))
    }
}
