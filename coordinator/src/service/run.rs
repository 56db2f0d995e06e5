//! `RunService`: for people.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use proto::pb::run_service_server::RunService;
use proto::pb::{self};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::logs;
use crate::error::Error;
use crate::runs::Runs;

/// Between two messages to one watcher.
const WATCH_PERIOD: Duration = Duration::from_millis(250);

/// Bytes of a model's file in one message, at most.
const MODEL_PIECE: usize = 1 << 20;

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
        let request = request.into_inner();
        if request.dry_run {
            return Ok(Response::new(self.0.preview(request).await?));
        }
        let name = self.0.submit(request, None).await?;
        self.describe(&name).await
    }

    async fn submit_run_with_weights(
        &self,
        request: Request<Streaming<pb::SubmitRunWithWeightsRequest>>,
    ) -> Result<Response<pb::Run>, Status> {
        use pb::submit_run_with_weights_request::Part;
        let mut stream = request.into_inner();
        let Some(Part::Start(start)) = stream.message().await?.and_then(|message| message.part) else {
            return Err(Status::invalid_argument("the first message must be `start`"));
        };
        let name = match self.0.by_request(&start.request_id) {
            Some(name) => name,
            None => {
                let sent = self.0.receive_weights(&start, &mut stream).await?;
                self.0.submit(start, Some(sent)).await?
            }
        };
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
        let request = request.into_inner();
        self.0.find(&request.run)?;
        let (sender, receiver) = mpsc::channel(256);
        let runs = Arc::clone(&self.0);
        tokio::spawn(async move {
            if let Err(error) = logs::send(&runs, &request, &sender).await {
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
        let pb::ResumeRunRequest { request_id, run, step, epochs } = request.into_inner();
        self.0.resume(&run, request_id, step, epochs).await?;
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
