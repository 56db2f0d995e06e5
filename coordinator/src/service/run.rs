//! `RunService`: for people.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use proto::pb::run_service_server::RunService;
use proto::pb::{self};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::error::Error;
use crate::runs::Runs;

/// Between two messages to one watcher.
const WATCH_PERIOD: Duration = Duration::from_millis(250);

/// Bytes of a model's file in one message, at most.
const MODEL_PIECE: usize = 1 << 20;

/// How often the store is asked for more log lines.
const LOG_PERIOD: Duration = Duration::from_secs(1);

/// Agents store what ranks say every few seconds: after a run's end the last lines may still be on their way.
const LAST_LINES: Duration = Duration::from_secs(4);

/// See `run.proto`.
pub(crate) struct RunApi(pub(crate) Arc<Runs>);

impl RunApi {
    async fn describe(&self, name: &str) -> Result<Response<pb::Run>, Status> {
        Ok(Response::new(self.0.describe(name).await?))
    }
}

#[tonic::async_trait]
impl RunService for RunApi {
    async fn submit_run(&self, request: Request<pb::SubmitRunRequest>) -> Result<Response<pb::Run>, Status> {
        let name = self.0.submit(request.into_inner()).await?;
        self.describe(&name).await
    }

    async fn get_run(&self, request: Request<pb::GetRunRequest>) -> Result<Response<pb::Run>, Status> {
        self.describe(&request.into_inner().run).await
    }

    async fn list_runs(&self, request: Request<pb::ListRunsRequest>) -> Result<Response<pb::ListRunsResponse>, Status> {
        let limit = request.into_inner().limit as usize;
        Ok(Response::new(pb::ListRunsResponse { runs: self.0.list(limit).await? }))
    }

    type WatchRunStream = ReceiverStream<Result<pb::Run, Status>>;

    async fn watch_run(&self, request: Request<pb::GetRunRequest>) -> Result<Response<Self::WatchRunStream>, Status> {
        let name = request.into_inner().run;
        self.0.find(&name)?;
        let (sender, receiver) = mpsc::channel(1);
        let runs = Arc::clone(&self.0);
        tokio::spawn(async move { watch(&runs, &name, &sender).await });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    type GetLogsStream = ReceiverStream<Result<pb::LogLine, Status>>;

    async fn get_logs(&self, request: Request<pb::GetLogsRequest>) -> Result<Response<Self::GetLogsStream>, Status> {
        let pb::GetLogsRequest { run, follow } = request.into_inner();
        self.0.find(&run)?;
        let (sender, receiver) = mpsc::channel(256);
        let runs = Arc::clone(&self.0);
        tokio::spawn(async move {
            if let Err(error) = logs(&runs, &run, follow, &sender).await {
                // The caller may have gone, too.
                let _ = sender.send(Err(error.into())).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn get_metrics(
        &self,
        request: Request<pb::GetMetricsRequest>,
    ) -> Result<Response<pb::GetMetricsResponse>, Status> {
        let pb::GetMetricsRequest { run, kinds } = request.into_inner();
        Ok(Response::new(pb::GetMetricsResponse { metrics: self.0.points(&run, &kinds).await? }))
    }

    async fn cancel_run(&self, request: Request<pb::CancelRunRequest>) -> Result<Response<pb::Run>, Status> {
        let name = request.into_inner().run;
        self.0.cancel(&name).await?;
        self.describe(&name).await
    }

    async fn resume_run(&self, request: Request<pb::ResumeRunRequest>) -> Result<Response<pb::Run>, Status> {
        let pb::ResumeRunRequest { request_id, run, step } = request.into_inner();
        self.0.resume(&run, request_id, step).await?;
        self.describe(&run).await
    }

    async fn delete_run(
        &self,
        request: Request<pb::DeleteRunRequest>,
    ) -> Result<Response<pb::DeleteRunResponse>, Status> {
        self.0.delete(&request.into_inner().run).await?;
        Ok(Response::new(pb::DeleteRunResponse {}))
    }

    type GetModelFileStream = BoxStream<'static, Result<pb::ModelPiece, Status>>;

    async fn get_model_file(
        &self,
        request: Request<pb::GetModelFileRequest>,
    ) -> Result<Response<Self::GetModelFileStream>, Status> {
        let pb::GetModelFileRequest { run, file } = request.into_inner();
        let (folder, digests) = self.0.model(&run)?;
        if !digests.contains_key(&file) {
            let files = digests.into_keys().collect::<Vec<_>>().join(", ");
            return Err(Status::not_found(format!("the model of run {run:?} has no file {file:?}, but: {files}")));
        }
        let key = format!("{folder}/{file}");
        let bytes = self.0.store.stream(&key, None).await.map_err(Error::from)?;
        let bytes = bytes.ok_or_else(|| Status::data_loss(format!("{key} is gone from the store")))?;
        let pieces = bytes.flat_map(move |read| {
            futures::stream::iter(match read {
                Ok(bytes) => {
                    let part = |at: usize| bytes.slice(at..(at + MODEL_PIECE).min(bytes.len()));
                    (0..bytes.len()).step_by(MODEL_PIECE).map(|at| Ok(pb::ModelPiece { bytes: part(at) })).collect()
                }
                Err(error) => vec![Err(Status::unavailable(format!("{key}: {error}")))],
            })
        });
        Ok(Response::new(pieces.boxed()))
    }

    async fn compare_runs(
        &self,
        request: Request<pb::CompareRunsRequest>,
    ) -> Result<Response<pb::CompareRunsResponse>, Status> {
        let pb::CompareRunsRequest { a, b } = request.into_inner();
        Ok(Response::new(self.0.compare(&a, &b).await?))
    }

    async fn get_status(&self, _: Request<pb::GetStatusRequest>) -> Result<Response<pb::Status>, Status> {
        let datasets = &self.0.datasets;
        let (mut shards_waiting, mut shards_leased) = (0, 0);
        for (_, counts) in datasets.all() {
            shards_waiting += u64::from(counts.waiting);
            shards_leased += u64::from(counts.leased);
        }
        let worker = |(worker, leases, seen): (String, u32, Duration)| {
            let seen_millis_ago = u64::try_from(seen.as_millis()).unwrap_or(u64::MAX);
            pb::WorkerStatus { worker, leases, seen_millis_ago }
        };
        Ok(Response::new(pb::Status {
            term: self.0.term.number(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            store: self.0.store.name(),
            workers: datasets.workers().into_iter().map(worker).collect(),
            agents: self.0.agents(),
            shards_waiting,
            shards_leased,
            runs_waiting: self.0.count(pb::RunState::Waiting),
            runs_running: self.0.count(pb::RunState::Running),
            troubles: datasets.troubles(None),
        }))
    }
}

async fn watch(runs: &Runs, name: &str, sender: &mpsc::Sender<Result<pb::Run, Status>>) {
    let mut last: Option<pb::Run> = None;
    loop {
        let over = runs.is_over(name);
        let run = match runs.describe(name).await {
            Ok(run) => run,
            Err(error) => {
                let _ = sender.send(Err(error.into())).await;
                return;
            }
        };
        if last.as_ref() != Some(&run) && sender.send(Ok(run.clone())).await.is_err() || over {
            return;
        }
        last = Some(run);
        tokio::select! {
            () = sender.closed() => return,
            () = tokio::time::sleep(WATCH_PERIOD) => {}
        }
    }
}

/// Sends the stored lines, and with `follow` those that are stored later, until a while after the run's end. Lines come
/// from the store alone, so none is doubled, and they are there after death and cancel.
async fn logs(
    runs: &Runs,
    run: &str,
    follow: bool,
    sender: &mpsc::Sender<Result<pb::LogLine, Status>>,
) -> Result<(), Error> {
    let mut sent = HashSet::new();
    let mut ended: Option<tokio::time::Instant> = None;
    loop {
        if runs.is_over(run) {
            ended.get_or_insert_with(tokio::time::Instant::now);
        } else {
            ended = None;
        }
        for key in runs.store.list(&proto::keys::logs_of(run)).await? {
            if sent.contains(&key) {
                continue;
            }
            let (generation, rank) = log_of(&key).unwrap_or_default();
            let bytes = runs.store.need(&key).await?;
            sent.insert(key);
            for line in String::from_utf8_lossy(&bytes).lines() {
                if sender.send(Ok(pb::LogLine { generation, rank, line: line.to_owned() })).await.is_err() {
                    return Ok(());
                }
            }
        }
        if !follow || ended.is_some_and(|at| at.elapsed() >= LAST_LINES) {
            return Ok(());
        }
        tokio::select! {
            () = sender.closed() => return Ok(()),
            () = tokio::time::sleep(LOG_PERIOD) => {}
        }
    }
}

/// Generation and rank of `.../000001-0002-000003.log`.
fn log_of(key: &str) -> Option<(u64, u32)> {
    let mut parts = key.rsplit('/').next()?.split('-');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}
