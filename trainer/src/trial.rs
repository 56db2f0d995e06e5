//! A few steps on a device, to see that it can train, how fast, and whether it or this machine's processor is what
//! holds it up.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use proto::RunSpec;

use crate::learn::synthetic::Synthetic;
use crate::torch::{Group, Member, Store, device};

/// Steps that are not counted: in the first ones libtorch chooses how it computes.
const BEFORE: u32 = 2;
/// Steps that are counted at least, ...
const STEPS: u32 = 20;
/// ... and for how long on a GPU: its driver counts how busy it is over up to a second.
const LEAST: Duration = Duration::from_secs(5);
/// What a collective may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a trial has found.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    /// As in `--devices`.
    pub device: String,
    /// `f32`, `tf32` or `bf16`.
    pub precision: &'static str,
    /// Samples in a step.
    pub batch: u32,
    /// Steps that were counted.
    pub steps: u32,
    /// Over all of them.
    pub images_per_second: f64,
    /// The share of the time in which the device worked: of a GPU as its driver tells (`nvidia-smi`), of the CPU how
    /// many of its cores were busy with this. None: nobody tells.
    pub busy: Option<f64>,
}

/// Trains the default network on random pixels, on each of the devices that `--devices` names, or on all GPUs. On a GPU
/// once as it is, once in TF32, and once in bf16.
///
/// # Errors
/// If there is no such device, or it fails.
pub fn trials(devices: Option<&str>) -> Result<Vec<Trial>> {
    let mut devices = crate::agent::devices::chosen(devices.unwrap_or("cuda"))?;
    devices.dedup();
    let mut trials = Vec::new();
    for name in devices {
        // What a CPU can do in half a minute.
        let (batch, precisions) = if name == "cpu" { (32, &["f32"][..]) } else { (256, &["f32", "tf32", "bf16"][..]) };
        for precision in precisions {
            let trial = trial(&name, precision, batch, STEPS);
            trials.push(trial.with_context(|| format!("{name}, {precision}"))?);
        }
    }
    Ok(trials)
}

fn trial(name: &str, precision: &'static str, batch: u32, least: u32) -> Result<Trial> {
    let spec = format!(
        "dataset = \"none\"\ntrain = {{ batch = {batch} }}\nranks = {{ max = 1, precision = \"{precision}\" }}"
    );
    let spec = RunSpec::from_toml(&spec)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    tch::set_num_threads(cores as i32);
    let device = device::parse(name)?;
    let store = Store::serve("127.0.0.1")?;
    let member = Member { rank: 0, world: 1, address: "127.0.0.1".to_owned(), device, timeout: DEADLINE };
    let group = Group::join("127.0.0.1", store.port(), member, || false)?;
    let mut rank = Synthetic::new(&spec, &group, (0, 1))?;
    for _ in 0..BEFORE {
        rank.step()?;
    }
    rank.settle()?;
    let time = if device.is_cuda() { LEAST } else { Duration::ZERO };
    let (began, cpu) = (Instant::now(), cpu_seconds()?);
    let over = AtomicBool::new(false);
    let (steps, uses) = std::thread::scope(|scope| {
        let watch = device.is_cuda().then(|| scope.spawn(|| gpu_uses(name, &over)));
        let mut steps = 0;
        let trained = loop {
            if steps >= least && began.elapsed() >= time {
                break rank.settle();
            }
            if let Err(failure) = rank.step() {
                break Err(failure);
            }
            steps += 1;
        };
        over.store(true, Ordering::Relaxed);
        let uses = watch.and_then(|watch| watch.join().ok()).unwrap_or_default();
        trained.map(|()| (steps, uses))
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let busy = if device.is_cuda() {
        (!uses.is_empty()).then(|| uses.iter().sum::<f64>() / uses.len() as f64)
    } else {
        Some((cpu_seconds()? - cpu) / seconds / cores as f64)
    };
    let images_per_second = f64::from(steps) * rank.samples() as f64 / seconds;
    Ok(Trial { device: name.to_owned(), precision, batch, steps, images_per_second, busy })
}

/// The shares of its time in which a GPU works, again and again until it is `over`. None of the first second, which has
/// a part of before.
fn gpu_uses(name: &str, over: &AtomicBool) -> Vec<f64> {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let gpu = driver_name(name, visible.as_deref());
    let mut uses = Vec::new();
    std::thread::sleep(Duration::from_secs(1));
    while !over.load(Ordering::Relaxed) {
        let query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i", &gpu];
        let Ok(told) = Command::new("nvidia-smi").args(query).output() else { break };
        let percent = String::from_utf8_lossy(&told.stdout).trim().parse::<f64>();
        // Asked while it trained, not when that was over.
        if !over.load(Ordering::Relaxed) {
            uses.extend(percent.map(|percent| percent / 100.0));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    uses
}

/// What the driver calls the GPU that libtorch calls `cuda:N`: its number or its UUID.
fn driver_name(name: &str, visible: Option<&str>) -> String {
    let number = name.trim_start_matches("cuda:");
    let listed = visible.and_then(|visible| visible.split(',').nth(number.parse().ok()?));
    listed.map(str::trim).filter(|listed| !listed.is_empty()).unwrap_or(number).to_owned()
}

/// Processor time of this process.
///
/// # Errors
/// If the system does not tell.
pub(crate) fn cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    // The 14th and 15th field of the whole line, in ticks, of which Linux counts 100 a second.
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>).sum::<Result<f64, _>>()?;
    Ok(ticks / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_is_tried_and_says_how_fast_and_how_busy_it_was() {
        let Trial { device, steps, images_per_second, busy, .. } = trial("cpu", "f32", 4, 1).expect("a CPU");
        assert_eq!((device.as_str(), steps), ("cpu", 1));
        assert!(images_per_second > 0.0 && images_per_second.is_finite());
        // A process is billed by hundredths of a second.
        assert!(busy.is_some_and(|busy| busy > 0.0 && busy < 1.5), "{busy:?}");
    }

    #[test]
    fn a_gpu_is_asked_about_by_the_name_that_the_driver_has_for_it() {
        assert_eq!(driver_name("cuda:1", None), "1");
        assert_eq!(driver_name("cuda:1", Some("3, 5")), "5");
        assert_eq!(driver_name("cuda:0", Some("GPU-8932f937")), "GPU-8932f937");
        assert_eq!(driver_name("cuda:0", Some("")), "0");
    }
}
