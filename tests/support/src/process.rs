//! What the kernel knows of processes (proc(5)), and signals.

use std::collections::HashMap;
use std::process::Command;

/// Linux counts in these for all programs, whatever its own clock does.
const TICKS_PER_SECOND: f64 = 100.0;

/// One process's line in `/proc/PID/stat`.
struct Stat {
    state: char,
    parent: u32,
    cpu: f64,
    ended_children: f64,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may hold anything; the third follows its last parenthesis.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |field: usize| Some(fields.get(field - 3)?.parse::<f64>().ok()? / TICKS_PER_SECOND);
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        cpu: ticks(14)? + ticks(15)?,
        ended_children: ticks(16)? + ticks(17)?,
    })
}

/// CPU seconds of one process; None if it is gone.
pub fn cpu_seconds(pid: u32) -> Option<f64> {
    stat(pid).map(|stat| stat.cpu)
}

/// The parent of a process that lives: a zombie does not.
pub fn parent(pid: u32) -> Option<u32> {
    stat(pid).filter(|stat| stat.state != 'Z').map(|stat| stat.parent)
}

/// The most memory that one process ever held at once, in MB; None if it is gone.
pub fn peak_mb(pid: u32) -> Option<f64> {
    kilobytes(&format!("/proc/{pid}/status"), "VmHWM:").map(|kilobytes| kilobytes * 1024.0 / 1e6)
}

/// CPU seconds and memory in MB of a process with all that it started. Memory that several of them share counts once.
pub fn tree(root: u32) -> (f64, f64) {
    let all: HashMap<u32, Stat> = pids().filter_map(|pid| Some((pid, stat(pid)?))).collect();
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
        // The proportional set size.
        let own = kilobytes(&format!("/proc/{pid}/smaps_rollup"), "Pss:").unwrap_or(0.0) * 1024.0 / 1e6;
        (cpu + stat.cpu + stat.ended_children, memory + own)
    })
}

fn kilobytes(file: &str, field: &str) -> Option<f64> {
    let text = std::fs::read_to_string(file).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(field))?;
    value.trim().trim_end_matches(" kB").parse().ok()
}

/// The processes whose arguments are as `wanted` says.
pub fn with_arguments(wanted: impl Fn(&[&[u8]]) -> bool) -> Vec<u32> {
    let is_wanted = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        wanted(&line.split(|&byte| byte == 0).collect::<Vec<_>>())
    };
    pids().filter(is_wanted).collect()
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Sends a signal by its name: `KILL`, `STOP`.
///
/// # Panics
/// If there is no such process.
pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().expect("kill(1)");
    assert!(status.success(), "kill -{name} {pid}");
}

/// `kill -9` of any process.
pub fn kill(pid: u32) {
    signal(pid, "KILL");
}
