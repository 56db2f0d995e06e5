//! `gleaner run ...`: one command a file; [`view`] shows a run to people and programs, [`wait`] follows it to its end.

mod calibration;
mod cancel;
mod card;
pub(crate) mod compare;
mod delete;
mod describe;
pub(crate) mod evaluate;
pub(crate) mod explain;
mod export;
mod extend;
mod int8;
mod list;
mod logs;
mod metrics;
mod model;
pub(crate) mod model_files;
pub(crate) mod network;
mod plot;
mod resume;
mod submit;
mod verify;
pub(crate) mod view;
mod wait;
mod weights;

use anyhow::Result;

use crate::client::{ClusterArgs, TimeoutArgs};
use crate::complete;

/// Submits, shows and ends training runs.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Submit a training run
    Submit(submit::Args),
    /// List the runs, the newest first
    List(list::Args),
    /// Show a run: its state, its newest figures, its history, its spec
    Describe(NameArgs),
    /// Show the learning curve until the run has ended
    Watch(NameArgs),
    /// Wait until the run has ended
    Wait {
        #[command(flatten)]
        of: NameArgs,
        #[command(flatten)]
        timeout: TimeoutArgs,
    },
    /// Print what the run's ranks wrote
    Logs(logs::Args),
    /// Print the learning curve
    Metrics(metrics::Args),
    /// Write the learning curves of runs for TensorBoard
    Export(export::Args),
    /// Fetch a done run's model, for PyTorch, phones, or as a page for browsers
    Model(model::Args),
    /// Try a trained model on a split of a dataset: accuracy by class, and what it takes for what
    Evaluate(evaluate::Args),
    /// Say what was changed from one run to another, what came of it, and what `verify` says; ends as that does
    Compare(verify::Args),
    /// Say whether two runs were trained on the same samples in each step; ends with 1 if not
    Verify(verify::Args),
    /// Say what bounds the run: data, compute, the host of a GPU, network, or one of its ranks
    Explain(NameArgs),
    /// End a run after the step it is at, with a checkpoint
    Cancel(NameArgs),
    /// Queue a cancelled or failed run again, from its last checkpoint
    Resume(resume::Args),
    /// Train a run that has ended for more epochs, from its last checkpoint
    Extend(extend::Args),
    /// Delete a run that has ended, with its checkpoints and its model
    Delete(delete::Args),
}

/// A run by name.
#[derive(Debug, clap::Args)]
pub(crate) struct NameArgs {
    /// The run's name
    #[arg(add = complete::runs())]
    run: String,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Runs one command.
pub(crate) async fn run(command: Command) -> Result<()> {
    match command {
        Command::Submit(args) => submit::run(args).await,
        Command::List(args) => list::run(&args).await,
        Command::Describe(of) => describe::run(&of).await,
        Command::Watch(of) => wait::run(&of, None, true).await,
        Command::Wait { of, timeout } => wait::run(&of, timeout.timeout, false).await,
        Command::Logs(args) => logs::run(&args).await,
        Command::Metrics(args) => metrics::run(args).await,
        Command::Export(args) => export::run(args).await,
        Command::Model(args) => model::run(args).await,
        Command::Evaluate(args) => evaluate::run(args).await,
        Command::Compare(args) => compare::run(&args).await,
        Command::Verify(args) => verify::run(&args).await,
        Command::Explain(of) => explain::run(&of).await,
        Command::Cancel(of) => cancel::run(&of).await,
        Command::Resume(args) => resume::run(&args).await,
        Command::Extend(args) => extend::run(&args).await,
        Command::Delete(args) => delete::run(&args).await,
    }
}
