//! What the kernel knows of processes (proc(5)).

use std::collections::HashMap;

use anyhow::{Context, Result};

/// Linux counts in these for all programs, whatever its own clock does.
const TICKS_PER_SECOND: f64 = 100.0;

/// One process's line in `/proc/PID/stat`.
struct Stat {
    parent: u32,
    /// Its own, and that of its children that have ended.
    cpu: f64,
    ended_children: f64,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may hold anything; the third follows its last parenthesis.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |field: usize| Some(fields.get(field - 3)?.parse::<f64>().ok()? / TICKS_PER_SECOND);
    Some(Stat {
        parent: fields.get(1)?.parse().ok()?,
        cpu: ticks(14)? + ticks(15)?,
        ended_children: ticks(16)? + ticks(17)?,
    })
}

/// CPU seconds of one process.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    stat(pid).map(|stat| stat.cpu).with_context(|| format!("process {pid} is gone"))
}

/// The most memory that one process ever held at once, in MB.
pub(crate) fn peak_mb(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kilobytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kilobytes * 1024.0 / 1e6)
}

/// CPU seconds and memory in MB of a process with all that it started. Memory that several of them share counts once.
pub(crate) fn tree(root: u32) -> (f64, f64) {
    let all: HashMap<u32, Stat> = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, stat(pid)?)))
        .collect();
    let belongs = |mut pid: u32| {
        while pid != root {
            match all.get(&pid) {
                Some(stat) if stat.parent > 1 => pid = stat.parent,
                _ => return false,
            }
        }
        true
    };
    let members = all.iter().filter(|&(&pid, _)| belongs(pid));
    members.fold((0.0, 0.0), |(cpu, memory), (&pid, stat)| {
        (cpu + stat.cpu + stat.ended_children, memory + proportional_mb(pid).unwrap_or(0.0))
    })
}

fn proportional_mb(pid: u32) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<f64>().ok()? * 1024.0 / 1e6)
}
