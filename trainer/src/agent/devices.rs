//! The devices of this machine.

use anyhow::{Result, bail, ensure};
use tch::Cuda;

/// Every GPU that libtorch sees, or else one CPU.
pub fn devices() -> Vec<String> {
    match Cuda::device_count() {
        0 => vec!["cpu".to_owned()],
        n => (0..n).map(|i| format!("cuda:{i}")).collect(),
    }
}

/// What `--devices` means: `cpu`, `cpu:N` (N ranks on the CPU), `cuda` (all GPUs), `cuda:N` (that one), or several of
/// these with commas.
pub(crate) fn chosen(text: &str) -> Result<Vec<String>> {
    let mut chosen = Vec::new();
    for word in text.split(',').map(str::trim) {
        match word.split_once(':') {
            None if word == "cpu" => chosen.push(word.to_owned()),
            None if word == "cuda" => {
                let all = devices();
                ensure!(all[0] != "cpu", "--devices {text}: libtorch sees no GPU here");
                chosen.extend(all);
            }
            Some(("cpu", n)) if matches!(n.parse(), Ok(1..=1024)) => {
                chosen.extend(std::iter::repeat_n("cpu".to_owned(), n.parse().unwrap_or(1)));
            }
            Some(("cuda", n)) if n.parse::<usize>().is_ok() => {
                let there = Cuda::device_count();
                ensure!(
                    matches!(n.parse::<i64>(), Ok(n) if n < there),
                    "--devices {text}: libtorch sees {there} GPUs here"
                );
                chosen.push(word.to_owned());
            }
            _ => bail!("--devices {text}: must be cpu, cpu:N, cuda, cuda:N, or several of these with commas"),
        }
    }
    Ok(chosen)
}

/// What is wrong with this machine's devices, if something is.
pub fn problem() -> Option<&'static str> {
    (cfg!(feature = "nccl") && Cuda::device_count() == 0).then_some(
        "this program is built for GPUs and sees none here, so that ranks would train on the CPU: see that the driver is as new as this \
         libtorch wants, that the container is given its devices (--gpus all, nvidia.com/gpu), and what CUDA_VISIBLE_DEVICES says",
    )
}

/// For people: libtorch, and the devices that ranks can run on.
pub fn describe() -> String {
    let nccl = if cfg!(feature = "nccl") { "with" } else { "without" };
    format!("libtorch {nccl} NCCL; devices: {}", devices().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_counted_out_and_nonsense_is_refused() {
        assert_eq!(chosen("cpu:2, cpu").expect("allowed"), ["cpu", "cpu", "cpu"]);
        for bad in ["", "gpu", "cpu:0", "cpu:x", "cuda:99"] {
            assert!(chosen(bad).is_err(), "{bad}");
        }
    }
}
