//! The command line's way to the coordinator: addresses, deadlines, repetition, and waits that outlive a coordinator.

use std::cell::Cell;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::Result;
use backon::{BackoffBuilder, ConstantBuilder, ExponentialBuilder, Retryable};
use proto::dial::{Dial, Dialled};
use proto::pb::dataset_service_client::DatasetServiceClient;
use proto::pb::run_service_client::RunServiceClient;
use proto::trace::{Carried, Carry};
use tonic::{Response, Status, Streaming};

use crate::dial::DialArgs;
use crate::exit::{Ended, Exit, is_outage};
use crate::output::{Format, note};

/// One call may take so long; a list that is streamed up may take longer.
const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// A wait gives up when the coordinator could not be reached for so long.
const WAIT_PATIENCE: Duration = Duration::from_secs(60);
/// A call that changes something is repeated for so long when its connection breaks.
const CALL_PATIENCE: Duration = Duration::from_secs(20);
/// Datasets with tens of thousands of classes have long descriptions.
const MESSAGE_BYTES: usize = 256 << 20;

/// What every command that asks the cluster takes.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ClusterArgs {
    #[command(flatten)]
    pub(crate) dial: DialArgs,
    /// How to answer
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,
}

/// The end of a wait.
#[derive(Debug, clap::Args)]
pub(crate) struct TimeoutArgs {
    /// Stop waiting after so long (90s, 5m, 1d2h) with exit code 124; the work goes on
    #[arg(long, value_parser = duration)]
    pub(crate) timeout: Option<Duration>,
}

impl TimeoutArgs {
    /// Refuses an end of what is not waited for.
    pub(crate) fn only_if(&self, waits: bool) -> Result<()> {
        match self.timeout {
            Some(_) if !waits => Err(Ended::usage("--timeout ends a wait: --wait has to stand beside it".to_owned())),
            _ => Ok(()),
        }
    }
}

/// Clients of one coordinator. They connect by themselves, again after each loss.
#[derive(Debug, Clone)]
pub(crate) struct Cluster {
    /// For datasets.
    pub(crate) datasets: DatasetServiceClient<Carried<Dialled>>,
    /// For runs and the cluster's status.
    pub(crate) runs: RunServiceClient<Carried<Dialled>>,
}

impl Cluster {
    /// Does not connect yet, so that a wait can begin while the coordinator is down.
    pub(crate) fn new(args: &ClusterArgs) -> Result<Self> {
        Ok(Self::over(&args.dial.dial()?))
    }

    /// The same, over a way that is known.
    pub(crate) fn over(dial: &Dial) -> Self {
        let channel = Carried::new(dial.channel(), Carry);
        Self {
            datasets: DatasetServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES),
            runs: RunServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES),
        }
    }
}

/// The answer of one call, or its failure, within the deadline of a call.
pub(crate) async fn answer<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(CALL_DEADLINE, call).await {
        Ok(answer) => answer.map(Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {} s", CALL_DEADLINE.as_secs()))),
    }
}

/// The answer of a call that may be repeated with the same request id: repeated while the coordinator is away, unless
/// it was never there.
pub(crate) async fn insist<T, F>(call: impl FnMut() -> F) -> Result<T, Status>
where
    F: Future<Output = Result<T, Status>>,
{
    let begun = Instant::now();
    let lost = Cell::new(false);
    call.retry(ConstantBuilder::new().with_delay(Duration::from_millis(500)).without_max_times())
        .when(|status| is_outage(status) && (lost.get() || !is_refused(status)) && begun.elapsed() < CALL_PATIENCE)
        .notify(|_, _| {
            if !lost.replace(true) {
                note("the coordinator was lost; trying again");
            }
        })
        .await
}

/// Whether nobody listens at the address, or somebody who cannot be meant.
fn is_refused(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return matches!(io.kind(), std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::InvalidData);
        }
        cause = error.source();
    }
    false
}

/// Reads a stream until `seen` breaks, opening it again whenever it ends early or breaks: a coordinator may die and be
/// replaced in between. Gives up when it could not be reached for a minute.
pub(crate) async fn follow<T, R>(
    mut open: impl AsyncFnMut() -> Result<Response<Streaming<T>>, Status>,
    mut seen: impl AsyncFnMut(T) -> Result<ControlFlow<R>>,
) -> Result<R> {
    let pauses = || {
        let pauses = ExponentialBuilder::new().with_min_delay(Duration::from_millis(100));
        pauses.with_max_delay(Duration::from_secs(2)).without_max_times().build()
    };
    let (mut lost_since, mut pause) = (None, pauses());
    loop {
        let end = match answer(open()).await {
            Ok(mut stream) => loop {
                match stream.message().await {
                    Ok(Some(message)) => {
                        (lost_since, pause) = (None, pauses());
                        if let ControlFlow::Break(result) = seen(message).await? {
                            return Ok(result);
                        }
                    }
                    Ok(None) => break Status::unavailable("the coordinator ended the stream"),
                    Err(status) => break status,
                }
            },
            Err(status) => status,
        };
        if !is_outage(&end) {
            return Err(end.into());
        }
        let since = lost_since.get_or_insert_with(|| {
            note("the coordinator does not answer; trying again for a minute");
            Instant::now()
        });
        if since.elapsed() > WAIT_PATIENCE {
            return Err(end.into());
        }
        tokio::time::sleep(pause.next().expect("the pauses have no end")).await;
    }
}

/// Waits for `work`, but not longer than `timeout` and not after Ctrl-C. Both leave the work itself running; `again` is
/// the command that comes back to it.
pub(crate) async fn wait_for<R>(
    work: impl Future<Output = Result<R>>,
    timeout: Option<Duration>,
    again: &str,
) -> Result<R> {
    let late = async {
        match timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        result = work => result,
        () = late => Err(Ended::error(Exit::TimedOut, format!("the time is over; the work goes on. Come back with: {again}"))),
        _ = tokio::signal::ctrl_c() => Err(Ended::error(Exit::Interrupted, format!("detached; the work goes on. Come back with: {again}"))),
    }
}

/// A duration as people write it: `90`, `90s`, `5m`, `1d2h`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    // A number alone counts seconds.
    let unit = if text.parse::<f64>().is_ok() { "s" } else { "" };
    humantime::parse_duration(&format!("{text}{unit}"))
        .map_err(|error| format!("{text:?} is no duration ({error}); write 90s, 5m or 1d2h"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units_and_nonsense_is_refused() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2h"), Ok(Duration::from_secs(7200)));
        assert_eq!(duration("1d2h"), Ok(Duration::from_secs(26 * 3600)));
        for wrong in ["", "m", "-1", "1x", "NaN", "1e300h"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
