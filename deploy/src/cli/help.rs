//! What `--help` says beside each flag's own words: flags that every command has stand together at the end, and under
//! the commands for people there are examples.

use clap::{Arg, Command};

/// Flags by their heading. Those of the second heading are the least needed: `-h` leaves them out.
const HEADINGS: [(&str, &[&str]); 2] = [
    ("Way to the cluster", &["coordinator", "token_file", "context", "tls_ca", "tls_cert", "tls_key"]),
    ("What is said", &["quiet", "log_format", "otlp_endpoint"]),
];

/// Examples by the command's words.
const EXAMPLES: [(&str, &[&str]); 12] = [
    ("local", &["gleaner local --store ./data --workers 4", "gleaner local --store s3://bucket/gleaner"]),
    (
        "dataset create",
        &[
            "gleaner dataset create birds --urls birds.txt --wait",
            "gleaner dataset create cc12m --urls cc12m.tsv --columns url,caption --unlabelled --keep-columns caption",
            "gleaner dataset create dogs --urls fall11_urls.txt.zst --synsets dogs.txt --per-class 1000 --dry-run",
        ],
    ),
    (
        "dataset import",
        &[
            "gleaner dataset import pets ./pets --wait",
            "gleaner dataset import food train-00000.parquet train-00001.parquet --class-column label",
            "gleaner dataset import birds https://birds.example/train-0000.tar https://birds.example/val-0000.tar --wait",
            "gleaner dataset import birds store:imports/birds --store s3://bucket/gleaner --wait",
        ],
    ),
    (
        "dataset refresh",
        &[
            "gleaner dataset refresh birds --wait",
            "gleaner dataset refresh birds --urls more-birds.txt",
            "gleaner dataset refresh birds --all",
        ],
    ),
    (
        "dataset outcomes",
        &["gleaner dataset outcomes birds --outcome not_found --limit 20", "gleaner dataset outcomes birds -o json"],
    ),
    ("dataset sample", &["gleaner dataset sample birds --to birds.png"]),
    (
        "dataset export",
        &[
            "gleaner dataset export birds --to ./birds --as tree",
            "gleaner dataset export birds --to s3://bucket/birds --as parquet",
        ],
    ),
    (
        "run submit",
        &[
            "gleaner run submit --dataset birds --follow",
            "gleaner run submit -f run.toml --set train.epochs=30 --name birds-long",
            "gleaner run submit --dataset birds --from alexnet.safetensors --set train.freeze=features",
        ],
    ),
    ("run model", &["gleaner run model birds-1 --to ./model", "gleaner run model birds-1 --to ./page --format page"]),
    (
        "run metrics",
        &[
            "gleaner run metrics birds-1 --plot",
            "gleaner run metrics birds-1 --kind validation --csv",
            "gleaner run metrics birds-1 --parquet birds-1.parquet",
        ],
    ),
    ("classify", &["gleaner classify birds-1 picture.jpg", "gleaner classify ./model ./holiday -o json"]),
    ("web", &["gleaner web --open", "gleaner web --store ./data"]),
];

/// The same commands, with that said.
pub(super) fn told(command: Command) -> Command {
    below(command, "")
}

fn below(command: Command, path: &str) -> Command {
    let examples = EXAMPLES.iter().find(|(words, _)| *words == path).map(|(_, examples)| examples.join("\n  "));
    let command = match examples {
        Some(examples) => command.after_help(format!("Examples:\n  {examples}")),
        None => command,
    };
    command.mut_args(placed).mut_subcommands(|sub| {
        let path = format!("{path} {}", sub.get_name());
        below(sub, path.trim_start())
    })
}

fn placed(arg: Arg) -> Arg {
    let place = HEADINGS.iter().position(|(_, ids)| ids.contains(&arg.get_id().as_str()));
    match place.map(|n| (n, HEADINGS[n].0)) {
        Some((0, heading)) => arg.help_heading(heading),
        Some((_, heading)) => arg.help_heading(heading).hide_short_help(true),
        None => arg,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli;

    #[test]
    fn every_example_is_a_command_that_is_understood() {
        for (words, examples) in EXAMPLES {
            for example in examples {
                assert!(example.starts_with(&format!("gleaner {words}")), "{example}");
                let parsed = cli::command().try_get_matches_from(example.split(' '));
                assert!(parsed.is_ok(), "{example}: {}", parsed.expect_err("it is not understood"));
            }
        }
    }

    #[test]
    fn the_flags_of_one_command_come_before_those_of_all() {
        let mut command = cli::command();
        command.build();
        let submit = command.find_subcommand_mut("run").and_then(|run| run.find_subcommand_mut("submit"));
        let mut submit = submit.expect("a command").clone();
        let long = submit.render_long_help().to_string();
        let at = |text: &str| long.find(text).unwrap_or_else(|| panic!("{text}: {long}"));
        assert!(
            at("--follow") < at("Way to the cluster:") && at("Way to the cluster:") < at("--coordinator"),
            "{long}"
        );
        assert!(at("--dataset birds --follow") > at("--coordinator"), "{long}");
        assert!(!submit.render_help().to_string().contains("--otlp-endpoint"));
    }
}
