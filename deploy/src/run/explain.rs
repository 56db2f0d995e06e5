//! `gleaner run explain`: what bounds a run, in words, with the numbers that say so.

use anyhow::Result;
use proto::pb::{GetMetricsRequest, GetRunRequest, Metric, Run, RunState};
use serde::Serialize;

use super::NameArgs;
use crate::client::{Cluster, answer};
use crate::output::{Format, say, say_json};

/// Of the newest measured steps so many are looked at.
const STEPS: usize = 100;

/// Below this share of the time with work to do a device waits for its host.
const BUSY: f64 = 0.8;

/// Where the time of a run's steps goes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Explanation {
    run: String,
    /// `data`, `compute`, `host`, `ranks`, `network`, or `nothing` if no step has been measured.
    bound_by: &'static str,
    generation: u64,
    ranks: u32,
    /// Measured steps that the rest is the mean of.
    pub(crate) steps: usize,
    images_per_second: f64,
    pub(crate) step_seconds: f64,
    data_wait_seconds: f64,
    compute_seconds: f64,
    rank_wait_seconds: f64,
    network_wait_seconds: f64,
    optimizer_seconds: f64,
    /// The rank that the others waited for most often, and in how many of the steps.
    slowest_rank: u32,
    slowest_in: usize,
    gradient_bytes: u64,
    link_bytes_per_second: f64,
    /// What a ring all-reduce of the gradients takes at the least: 2 (n - 1) / n of their bytes over the link.
    all_reduce_seconds: f64,
    /// The share of the time in which rank 0's device had a step's work to do, by its own clock, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<f64>,
}

/// Runs the command.
pub(super) async fn run(of: &NameArgs) -> Result<()> {
    let mut client = Cluster::new(&of.cluster)?.runs;
    let run = answer(client.get_run(GetRunRequest { run: of.run.clone() })).await?;
    let request = GetMetricsRequest { run: of.run.clone(), kinds: vec!["step".to_owned()] };
    let mut points = answer(client.get_metrics(request)).await?.metrics;
    // The newest one is reported before it is stored.
    points.extend(run.last_step.clone().filter(|last| points.iter().all(|point| point.step < last.step)));
    let explanation = measured(&run.run, &points);
    match of.cluster.output {
        Format::Json => say_json(&explanation),
        Format::Table => {
            words(&run, &explanation).iter().for_each(say);
            Ok(())
        }
    }
}

/// The mean over the newest steps of the newest generation.
pub(crate) fn measured(run: &str, points: &[Metric]) -> Explanation {
    let generation = points.iter().map(|point| point.generation).max().unwrap_or(0);
    let newest: Vec<&Metric> = points.iter().rev().filter(|point| point.generation == generation).take(STEPS).collect();
    let time = |point: &Metric| point.samples as f64 / point.images_per_second.max(1e-9);
    let steps = newest.len();
    let mean = |of: &dyn Fn(&Metric) -> f64| newest.iter().map(|point| of(point)).sum::<f64>() / steps.max(1) as f64;
    let seconds = |share: fn(&Metric) -> f64| mean(&|point| share(point) * time(point));
    let last = newest.first();
    let ranks = last.map_or(0, |point| point.ranks);
    let slowest_in = |rank: u32| newest.iter().filter(|point| point.slowest_rank == rank).count();
    let slowest_rank = (0..ranks).max_by_key(|&rank| slowest_in(rank)).unwrap_or(0);
    let (gradient_bytes, link) = last.map_or((0, 0.0), |point| (point.gradient_bytes, point.link_bytes_per_second));
    let ring = if ranks > 1 { 2.0 * f64::from(ranks - 1) / f64::from(ranks) } else { 0.0 };
    let step_seconds = mean(&time);
    let devices: Vec<f64> = newest.iter().filter_map(|point| point.device).collect();
    let device = (!devices.is_empty()).then(|| devices.iter().sum::<f64>() / devices.len() as f64);
    let mut explanation = Explanation {
        run: run.to_owned(),
        bound_by: "nothing",
        generation,
        ranks,
        steps,
        images_per_second: if steps == 0 { 0.0 } else { mean(&|point| point.samples as f64) / step_seconds },
        step_seconds,
        data_wait_seconds: seconds(|point| point.data_wait),
        compute_seconds: seconds(|point| point.compute),
        rank_wait_seconds: seconds(|point| point.rank_wait),
        network_wait_seconds: seconds(|point| point.network_wait),
        optimizer_seconds: seconds(|point| point.optimizer),
        slowest_rank,
        slowest_in: slowest_in(slowest_rank),
        gradient_bytes,
        link_bytes_per_second: link,
        all_reduce_seconds: if link > 0.0 { ring * gradient_bytes as f64 / link } else { 0.0 },
        device,
    };
    let parts = [
        ("compute", explanation.compute_seconds + explanation.optimizer_seconds),
        ("data", explanation.data_wait_seconds),
        ("ranks", explanation.rank_wait_seconds),
        ("network", explanation.network_wait_seconds),
    ];
    // Computing is what a run is for: something else bounds it only if a faster one would speed it up by a tenth and
    // more, or if the device has nothing to do for as long as that.
    let other = parts[1..].iter().copied().max_by(|(_, one), (_, other)| one.total_cmp(other));
    if steps > 0 {
        let other = other.filter(|(_, seconds)| *seconds > 0.1 * explanation.step_seconds);
        let computes = if device.is_some_and(|share| share < BUSY) { "host" } else { "compute" };
        explanation.bound_by = other.map_or(computes, |(name, _)| name);
    }
    explanation
}

impl Explanation {
    /// The parts of a step, each with its seconds.
    pub(crate) fn parts(&self) -> [(&'static str, f64); 5] {
        [
            ("waiting for data", self.data_wait_seconds),
            ("forward and backward", self.compute_seconds),
            ("waiting for the slowest rank", self.rank_wait_seconds),
            ("waiting for the network", self.network_wait_seconds),
            ("optimizer", self.optimizer_seconds),
        ]
    }
}

/// What bounds the run, with the numbers that say so; the last line is the verdict.
pub(crate) fn words(run: &Run, explanation: &Explanation) -> Vec<String> {
    let Explanation { run: name, bound_by, generation, ranks, steps, images_per_second, step_seconds, .. } =
        explanation;
    if *steps == 0 {
        let why = match run.state() {
            RunState::Waiting => format!("it waits: {}", run.reason),
            state => format!("it is {}", state.as_str_name().trim_start_matches("RUN_STATE_").to_lowercase()),
        };
        return vec![format!("{name}: no step has been measured yet; {why}")];
    }
    let share = |seconds: f64| 100.0 * seconds / step_seconds.max(1e-9);
    let mut lines = vec![format!(
        "{name}: {images_per_second:.0} images/s, {step_seconds:.3} s a step (mean of {steps} measured steps of generation \
         {generation}, {ranks} ranks)"
    )];
    for (what, seconds) in explanation.parts() {
        lines.push(format!("  {what:<29} {seconds:>8.4} s  {:>3.0} %", share(seconds)));
    }
    if let Some(device) = explanation.device {
        let whose = if *ranks > 1 { "rank 0's device" } else { "the device" };
        lines.push(format!("  {whose} worked {:.0} % of the time", 100.0 * device));
    }
    if *ranks > 1 {
        let Explanation { gradient_bytes, link_bytes_per_second, all_reduce_seconds, network_wait_seconds, .. } =
            explanation;
        let megabytes = *gradient_bytes as f64 / 1e6;
        lines.push(format!(
            "  the link was measured to carry {:.0} MB/s each way; 2 x {}/{ranks} of {megabytes:.1} MB of gradients take \
             {all_reduce_seconds:.4} s of it, and {network_wait_seconds:.4} s were not hidden behind backward",
            link_bytes_per_second / 1e6,
            ranks - 1,
        ));
    }
    let without = |seconds: f64| images_per_second * step_seconds / (step_seconds - seconds).max(1e-9);
    lines.push(match *bound_by {
        "data" => format!(
            "bound by data: without waiting for it, {:.0} images/s. The store or the decoding is too slow; a larger --cache-bytes or \
             a --cache-dir of the trainers keeps decoded images, and more cores decode faster",
            without(explanation.data_wait_seconds)
        ),
        "ranks" => format!(
            "bound by rank {}: it was the last in {} of {steps} steps; without waiting for it, {:.0} images/s. See what else its \
             machine does, and whether ranks.lanes is a multiple of the ranks",
            explanation.slowest_rank,
            explanation.slowest_in,
            without(explanation.rank_wait_seconds)
        ),
        "network" => format!(
            "bound by the network: without waiting for it, {:.0} images/s. ranks.compress halves the gradients, a larger train.batch \
             sends them less often, model.arch = \"alexnet-slim\" has 20 times fewer",
            without(explanation.network_wait_seconds)
        ),
        "host" => {
            let device = explanation.device.unwrap_or(1.0);
            format!(
                "bound by the host: the device worked {:.0} % of the time, and waited for its next work in the rest; if it never did, \
                 {:.0} images/s. More or faster cores help, and a larger train.batch, which has fewer steps",
                100.0 * device,
                images_per_second / device.max(1e-9)
            )
        }
        _ => format!(
            "bound by compute: data, network and ranks together would give {:.0} images/s at most; more ranks or faster devices help",
            without(explanation.data_wait_seconds + explanation.rank_wait_seconds + explanation.network_wait_seconds)
        ),
    });
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step of half a second with 100 samples on two ranks; what is left of the shares is computing.
    fn step(n: u64, data_wait: f64, rank_wait: f64, network_wait: f64) -> Metric {
        Metric {
            kind: "step".to_owned(),
            generation: 2,
            step: n,
            samples: 100,
            images_per_second: 200.0,
            data_wait,
            rank_wait,
            network_wait,
            compute: 1.0 - data_wait - rank_wait - network_wait,
            slowest_rank: u32::from(!n.is_multiple_of(4)),
            ranks: 2,
            gradient_bytes: 200_000_000,
            link_bytes_per_second: 1e9,
            ..Metric::default()
        }
    }

    #[test]
    fn what_takes_most_of_the_step_beside_computing_bounds_the_run() {
        let bound = |data, ranks, network| {
            let points: Vec<Metric> = (1..=8).map(|n| step(n, data, ranks, network)).collect();
            measured("r", &points)
        };
        assert_eq!(bound(0.02, 0.01, 0.05).bound_by, "compute");
        assert_eq!(bound(0.3, 0.1, 0.2).bound_by, "data");
        assert_eq!(bound(0.0, 0.1, 0.2).bound_by, "network");
        let ranks = bound(0.1, 0.25, 0.2);
        assert_eq!((ranks.bound_by, ranks.slowest_rank, ranks.slowest_in), ("ranks", 1, 6));
        assert!((ranks.step_seconds - 0.5).abs() < 1e-9 && (ranks.rank_wait_seconds - 0.125).abs() < 1e-9);
        assert!((ranks.all_reduce_seconds - 0.2).abs() < 1e-9 && (ranks.images_per_second - 200.0).abs() < 1e-6);
    }

    #[test]
    fn words_name_the_bound_its_numbers_and_what_would_be_without_it() {
        let points: Vec<Metric> = (1..=8).map(|n| step(n, 0.0, 0.0, 0.5)).collect();
        let text = words(&Run::default(), &measured("r", &points)).join("\n");
        for said in ["bound by the network", "400 images/s", "1000 MB/s", "200.0 MB", "0.2000 s", "0.2500 s"] {
            assert!(text.contains(said), "{said}: {text}");
        }
        let waiting = Run { state: RunState::Waiting.into(), reason: "1 of 2 ranks".into(), ..Run::default() };
        let text = words(&waiting, &measured("r", &[])).join("\n");
        assert!(text.contains("1 of 2 ranks"), "{text}");
    }

    #[test]
    fn a_device_that_has_nothing_to_do_for_a_fifth_of_the_time_and_more_is_held_up_by_its_host_or_by_the_data() {
        let of = |data_wait, device| {
            let points: Vec<Metric> = (1..=8)
                .map(|n| Metric {
                    device: if n == 1 { None } else { device },
                    ranks: 1,
                    ..step(n, data_wait, 0.0, 0.0)
                })
                .collect();
            let explanation = measured("r", &points);
            let text = words(&Run::default(), &explanation);
            (explanation, text.join("\n"))
        };
        let (explanation, text) = of(0.0, Some(0.5));
        assert_eq!((explanation.bound_by, explanation.device), ("host", Some(0.5)));
        for said in ["  the device worked 50 % of the time\n", "bound by the host", "400 images/s"] {
            assert!(text.contains(said), "{said}: {text}");
        }
        let (explanation, text) = of(0.0, Some(0.97));
        assert!(explanation.bound_by == "compute" && text.contains("the device worked 97 % of the time"), "{text}");
        let (explanation, text) = of(0.3, Some(0.6));
        assert!(explanation.bound_by == "data" && text.contains("the device worked 60 % of the time"), "{text}");
        let (explanation, text) = of(0.0, None);
        assert!(explanation.bound_by == "compute" && !text.contains("worked"), "{text}");
        let json = serde_json::to_string(&explanation).expect("numbers");
        assert!(!json.contains("device"), "{json}");
    }

    #[test]
    fn only_the_newest_generation_counts() {
        let old = Metric { generation: 1, ranks: 4, ..step(1, 0.9, 0.0, 0.0) };
        let explanation = measured("r", &[old, step(2, 0.0, 0.0, 0.0)]);
        assert_eq!((explanation.steps, explanation.ranks, explanation.bound_by), (1, 2, "compute"));
    }
}
