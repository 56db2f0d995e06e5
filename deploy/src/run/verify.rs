//! `gleaner run verify`: were two runs trained on the same samples in each step?

use anyhow::Result;
use proto::pb::{CompareRunsRequest, CompareRunsResponse, LedgerLine};

use crate::client::{Cluster, ClusterArgs, answer};
use crate::complete;
use crate::exit::{Ended, Exit};
use crate::output::{Format, say, say_json};

/// Two runs by name.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A run's name
    #[arg(add = complete::runs())]
    pub(super) a: String,
    /// The other's
    #[arg(add = complete::runs())]
    pub(super) b: String,
    #[command(flatten)]
    pub(super) cluster: ClusterArgs,
}

/// Runs the command.
pub(super) async fn run(args: &Args) -> Result<()> {
    let found = ask(&Cluster::new(&args.cluster)?, args).await?;
    match args.cluster.output {
        Format::Json => say_json(&found)?,
        Format::Table => lines(args, &found).iter().for_each(say),
    }
    ended(args, &found)
}

/// What their ledgers say.
pub(super) async fn ask(cluster: &Cluster, Args { a, b, .. }: &Args) -> Result<CompareRunsResponse> {
    let request = CompareRunsRequest { a: a.clone(), b: b.clone() };
    Ok(answer(cluster.runs.clone().compare_runs(request)).await?)
}

/// For people.
pub(super) fn lines(Args { a, b, .. }: &Args, found: &CompareRunsResponse) -> Vec<String> {
    let CompareRunsResponse { equal, steps_a, steps_b, steps_equal, first_a, first_b, plan_a, plan_b } = found;
    if *equal {
        return vec![format!("equal: {a} and {b} were trained on the same samples in each of {steps_a} steps")];
    }
    let differing =
        format!("different: {steps_equal} steps had the same samples; {a} has {steps_a}, {b} has {steps_b} steps");
    let first = [(a, first_a), (b, first_b)].map(|(run, line)| match line {
        Some(LedgerLine { epoch, step, generation, samples, digest }) => {
            format!(
                "{run}: step {step} of epoch {epoch}, generation {generation}: {samples} samples, digest {digest:016x}"
            )
        }
        None => format!("{run}: has no such step"),
    });
    let plans = format!(
        "{a} has plan {plan_a}, {b} plan {plan_b}: these share the samples of an epoch out to steps differently"
    );
    [differing].into_iter().chain((plan_a != plan_b).then_some(plans)).chain(first).collect()
}

/// A failure if they differ, so that a script can ask.
pub(super) fn ended(Args { a, b, .. }: &Args, found: &CompareRunsResponse) -> Result<()> {
    let differ = || Ended::error(Exit::Failed, format!("{a} and {b} were not trained on the same samples"));
    if found.equal { Ok(()) } else { Err(differ()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn runs_that_differ_name_their_plans_if_these_do() {
        let Cli { args } = clap::Parser::parse_from(["verify", "one", "other"]);
        let found = CompareRunsResponse { steps_a: 9, steps_b: 9, plan_a: 1, plan_b: 2, ..Default::default() };
        let said = lines(&args, &found);
        assert_eq!(said.len(), 4);
        assert!(said[1].starts_with("one has plan 1, other plan 2: "), "{}", said[1]);
        assert_eq!(lines(&args, &CompareRunsResponse { plan_a: 2, ..found }).len(), 3);
        assert_eq!(lines(&args, &CompareRunsResponse { equal: true, ..found }).len(), 1);
    }
}
