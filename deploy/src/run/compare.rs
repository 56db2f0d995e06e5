//! `gleaner run compare`

use anyhow::Result;
use proto::pb::{CompareRunsRequest, CompareRunsResponse, LedgerLine};

use crate::client::{Cluster, ClusterArgs, answer};
use crate::exit::{Ended, Exit};
use crate::output::{Format, say, say_json};

/// Arguments of `gleaner run compare`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A run's name
    a: String,
    /// The other's
    b: String,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Runs the command.
pub(super) async fn run(args: &Args) -> Result<()> {
    let Args { a, b, cluster } = args;
    let mut client = Cluster::new(cluster)?.runs;
    let request = CompareRunsRequest { a: a.clone(), b: b.clone() };
    let found = answer(client.compare_runs(request)).await?;
    let CompareRunsResponse { equal, steps_a, steps_b, steps_equal, ref first_a, ref first_b } = found;
    if cluster.output == Format::Json {
        say_json(&found)?;
    } else if equal {
        say(format!("equal: {a} and {b} were trained on the same samples in each of {steps_a} steps"));
    } else {
        say(format!("different: {steps_equal} steps had the same samples; {a} has {steps_a}, {b} has {steps_b} steps"));
        for (run, line) in [(a, first_a), (b, first_b)] {
            match line {
                Some(LedgerLine { epoch, step, generation, samples, digest }) => say(format!(
                    "{run}: step {step} of epoch {epoch}, generation {generation}: {samples} samples, digest {digest:016x}"
                )),
                None => say(format!("{run}: has no such step")),
            }
        }
    }
    if equal { Ok(()) } else { Err(Ended::error(Exit::Failed, format!("{a} and {b} differ"))) }
}
