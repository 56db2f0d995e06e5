//! `ExternalScaler`: tells KEDA how many workers and trainers the work that waits and runs is for.

use std::sync::Arc;
use std::time::Duration;

use proto::keda::external_scaler_server::ExternalScaler;
use proto::keda::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, MetricSpec, MetricValue,
    ScaledObjectRef,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::error::Error;
use crate::runs::Runs;

/// Between two questions whether a stream's answer has changed.
const POLL: Duration = Duration::from_millis(500);

/// See `externalscaler.proto`.
pub(crate) struct ScalerApi(pub(crate) Arc<Runs>);

/// What is scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Role {
    Worker,
    Trainer,
}

impl Role {
    fn of(reference: &ScaledObjectRef) -> Result<Self, Error> {
        match reference.scaler_metadata.get("role").map(String::as_str) {
            Some("worker") => Ok(Self::Worker),
            Some("trainer") => Ok(Self::Trainer),
            other => {
                Err(Error::Invalid(format!("metadata.role = {:?}: must be worker or trainer", other.unwrap_or(""))))
            }
        }
    }

    fn metric(self) -> &'static str {
        match self {
            Self::Worker => "gleaner-slices",
            Self::Trainer => "gleaner-devices",
        }
    }
}

/// How much one replica should have.
fn per_replica(reference: &ScaledObjectRef) -> Result<f64, Error> {
    let Some(text) = reference.scaler_metadata.get("perReplica") else { return Ok(1.0) };
    let number = text.parse().ok().filter(|n: &f64| n.is_finite() && *n > 0.0);
    number.ok_or_else(|| Error::Invalid(format!("metadata.perReplica = {text:?}: must be a number above 0")))
}

/// Slices that are made or could be, or devices that runs which have not ended would take.
fn wanted(runs: &Runs, role: Role) -> u64 {
    match role {
        Role::Worker => runs.datasets.leasable(),
        Role::Trainer => runs.devices_wanted(),
    }
}

#[tonic::async_trait]
impl ExternalScaler for ScalerApi {
    async fn is_active(&self, request: Request<ScaledObjectRef>) -> Result<Response<IsActiveResponse>, Status> {
        let role = Role::of(request.get_ref())?;
        Ok(Response::new(IsActiveResponse { result: wanted(&self.0, role) > 0 }))
    }

    type StreamIsActiveStream = ReceiverStream<Result<IsActiveResponse, Status>>;

    async fn stream_is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamIsActiveStream>, Status> {
        let role = Role::of(request.get_ref())?;
        let (sender, receiver) = mpsc::channel(1);
        let runs = Arc::clone(&self.0);
        tokio::spawn(async move {
            let mut last = None;
            loop {
                let result = wanted(&runs, role) > 0;
                if last != Some(result) && sender.send(Ok(IsActiveResponse { result })).await.is_err() {
                    return;
                }
                last = Some(result);
                tokio::select! {
                    () = sender.closed() => return,
                    () = tokio::time::sleep(POLL) => {}
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn get_metric_spec(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<GetMetricSpecResponse>, Status> {
        let (role, target) = (Role::of(request.get_ref())?, per_replica(request.get_ref())?);
        let spec = MetricSpec {
            metric_name: role.metric().to_owned(),
            target_size: (target.ceil() as i64).max(1),
            target_size_float: target,
        };
        Ok(Response::new(GetMetricSpecResponse { metric_specs: vec![spec] }))
    }

    async fn get_metrics(&self, request: Request<GetMetricsRequest>) -> Result<Response<GetMetricsResponse>, Status> {
        let request = request.into_inner();
        let role = Role::of(&request.scaled_object_ref.unwrap_or_default())?;
        let value = wanted(&self.0, role);
        let value = MetricValue {
            metric_name: role.metric().to_owned(),
            metric_value: i64::try_from(value).unwrap_or(i64::MAX),
            metric_value_float: value as f64,
        };
        Ok(Response::new(GetMetricsResponse { metric_values: vec![value] }))
    }
}
