//! The command tree. Flags are few, and a new one is a decision: a test holds the list.

mod help;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};

use crate::client::ClusterArgs;
use crate::dial::contexts;
use crate::telemetry::{Spans, TelemetryArgs};
use crate::{classify, dataset, doctor, fsck, gc, local, man, roles, run, secrets, status, token, web};

/// A distributed data-and-training cluster for image classification
///
/// A list of URLs goes in (most of them rotted); validated, resized, labelled images and a trained AlexNet come out.
#[derive(Debug, Parser)]
#[command(name = "gleaner", version, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) telemetry: TelemetryArgs,
    /// Say nothing but data and errors: no progress, no advice
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The command tree with its help.
pub(crate) fn command() -> clap::Command {
    help::told(Cli::command())
}

/// All commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole cluster on this machine: coordinator, fetch workers, trainer agent
    Local(local::Args),
    /// Show the whole job on this machine: a rotted list goes in, a trained AlexNet comes out
    #[cfg(feature = "demo")]
    Demo(crate::demo::Args),
    /// Create, show and delete datasets
    #[command(subcommand)]
    Dataset(dataset::Command),
    /// Submit, show and end training runs
    #[command(subcommand)]
    Run(run::Command),
    /// Say what a trained model sees in pictures
    Classify(classify::Args),
    /// Show what the cluster consists of and what waits
    Status(ClusterArgs),
    /// Show the cluster, its datasets and its runs to a browser
    Web(web::Args),
    /// Check this machine: version, devices, store, coordinator
    Doctor(doctor::Args),
    /// Check a store without a coordinator: every object against what names it
    Fsck(fsck::Args),
    /// Remove what nobody needs any more from a store: what lost attempts left, old checkpoints, what was deleted
    Gc(gc::Args),
    /// Name clusters, and choose the one that commands go to
    #[command(subcommand)]
    Config(contexts::Command),
    /// Make tokens, which say who may do what
    #[command(subcommand)]
    Token(token::Command),
    /// Prepare what a cluster needs
    #[command(subcommand)]
    Cluster(secrets::Command),
    /// Write a manual page for each command
    Man(man::Args),
    /// Run the coordinator, which decides who does what
    Coordinator(roles::CoordinatorArgs),
    /// Run a fetch worker
    Worker(roles::WorkerArgs),
    /// Run a trainer agent, which offers this machine's devices
    #[cfg(feature = "trainer")]
    Trainer(roles::TrainerArgs),
    /// One rank process; started by its trainer agent
    #[cfg(feature = "trainer")]
    #[command(hide = true)]
    Rank(roles::RankArgs),
}

impl Command {
    /// Whether it serves until it is told to end, and does not do one thing for somebody.
    pub(crate) fn is_role(&self) -> bool {
        match self {
            Command::Local(_) | Command::Coordinator(_) | Command::Worker(_) | Command::Web(_) => true,
            #[cfg(feature = "trainer")]
            Command::Trainer(_) | Command::Rank(_) => true,
            _ => false,
        }
    }

    /// What is logged when nobody chose: the roles tell of their work, the other commands only of trouble.
    pub(crate) fn default_log(&self) -> &'static str {
        if self.is_role() { "info" } else { "warn" }
    }

    /// Does it. `telemetry` is the process's, for those that start others; `spans` exports what it measures.
    #[cfg_attr(not(feature = "trainer"), expect(unused_variables, reason = "only a rank may be killed before its end"))]
    pub(crate) async fn run(self, telemetry: TelemetryArgs, spans: Spans) -> Result<()> {
        match self {
            Command::Local(args) => local::run(args, telemetry).await,
            #[cfg(feature = "demo")]
            Command::Demo(args) => crate::demo::run(args).await,
            Command::Dataset(command) => dataset::run(command).await,
            Command::Run(command) => run::run(command).await,
            Command::Classify(args) => classify::run(args).await,
            Command::Status(args) => status::run(&args).await,
            Command::Web(args) => web::run(args).await,
            Command::Doctor(args) => doctor::run(args).await,
            Command::Fsck(args) => fsck::run(args).await,
            Command::Gc(args) => gc::run(args).await,
            Command::Config(command) => contexts::run(command),
            Command::Token(command) => token::run(command),
            Command::Cluster(command) => secrets::run(command),
            Command::Man(args) => man::run(&args, command()),
            Command::Coordinator(args) => roles::coordinator(args).await,
            Command::Worker(args) => roles::worker(args).await,
            #[cfg(feature = "trainer")]
            Command::Trainer(args) => roles::trainer(args, &telemetry).await,
            #[cfg(feature = "trainer")]
            Command::Rank(args) => roles::rank(args, spans).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The long flags of a command, without those that every command has.
    fn flags(path: &[&str]) -> Vec<String> {
        let mut command = command();
        command.build();
        let found = path.iter().fold(&command, |command, name| command.find_subcommand(name).expect("a command"));
        #[rustfmt::skip]
        let every = ["help", "quiet", "log-format", "otlp-endpoint", "coordinator", "token-file", "context", "tls-ca", "tls-cert", "tls-key", "output"];
        let longs = found.get_arguments().filter_map(|arg| arg.get_long());
        longs.filter(|long| !every.contains(long)).map(str::to_owned).collect()
    }

    #[test]
    fn the_flags_are_these_and_no_more() {
        Cli::command().debug_assert();
        #[rustfmt::skip]
        let expected: [(&[&str], &str); 45] = [
            (&["local"], "store listen insecure web-listen open workers ranks leave-seconds allow-net import-root exit-with-stdin"),
            (&["dataset", "create"], "urls store-key format synset-column url-column url-format columns limit dry-run unlabelled multi-label keep-columns verify respect synsets url-template class-names \
                size resize no-upscale encode-format reencode quality validation test seed slice-urls per-class min-bytes spec set wait timeout"),
            (&["dataset", "import"], "class-column image-column store splits dry-run unlabelled keep-columns multi-label synsets class-names limit \
                size resize no-upscale encode-format reencode quality validation test seed slice-urls per-class min-bytes spec set wait timeout"),
            (&["dataset", "refresh"], "urls store-key format synset-column url-column url-format columns limit import class-column image-column store all accept-damage wait timeout"),
            (&["dataset", "outcomes"], "store outcome synset limit version"),
            (&["dataset", "sample"], "store to synset each split version"),
            (&["dataset", "diff"], "store"),
            (&["dataset", "export"], "store to as split version"),
            (&["dataset", "list"], ""),
            (&["dataset", "describe"], ""),
            (&["dataset", "watch"], ""),
            (&["dataset", "wait"], "timeout"),
            (&["dataset", "pause"], ""),
            (&["dataset", "resume"], ""),
            (&["dataset", "finish"], "after wait timeout"),
            (&["dataset", "priority"], ""),
            (&["dataset", "manifest"], "version"),
            (&["dataset", "delete"], "yes"),
            (&["run", "submit"], "file set dataset name from dry-run wait follow timeout"),
            (&["run", "list"], "limit state dataset"),
            (&["run", "describe"], ""),
            (&["run", "watch"], ""),
            (&["run", "wait"], "timeout"),
            (&["run", "logs"], "follow rank tail since"),
            (&["run", "metrics"], "kind csv plot parquet"),
            (&["run", "export"], "tensorboard"),
            (&["run", "model"], "to format weights"),
            (&["run", "evaluate"], "dataset split version csv"),
            (&["run", "compare"], ""),
            (&["run", "verify"], ""),
            (&["run", "explain"], ""),
            (&["run", "cancel"], ""),
            (&["run", "resume"], "at wait timeout"),
            (&["run", "extend"], "epochs wait timeout"),
            (&["run", "delete"], "yes"),
            (&["classify"], ""),
            (&["status"], ""),
            (&["web"], "web-listen store open exit-with-stdin"),
            (&["doctor"], "store gpu devices"),
            (&["fsck"], "store deep"),
            (&["gc"], "store dry-run grace"),
            (&["token", "new"], "role name to"),
            (&["config", "set-context"], ""),
            (&["config", "import-kubernetes"], "secret namespace kube-context"),
            (&["cluster", "secrets"], "authority dns namespace days only"),
        ];
        for (path, expected) in expected {
            let expected: Vec<&str> = expected.split_whitespace().collect();
            assert_eq!(flags(path), expected, "gleaner {}", path.join(" "));
        }
    }

    #[test]
    fn every_command_and_flag_says_what_it_is_for() {
        fn check(command: &clap::Command, path: &str) {
            assert!(command.get_about().is_some(), "{path}");
            for arg in command.get_arguments() {
                assert!(arg.get_help().is_some(), "{path} --{}", arg.get_id());
            }
            for sub in command.get_subcommands() {
                check(sub, &format!("{path} {}", sub.get_name()));
            }
        }
        check(&Cli::command(), "gleaner");
    }
}
