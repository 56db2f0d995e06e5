//! One rank process, as its agent sees it: started, spoken to, events, ended.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};

use anyhow::{Context, Result};
use prost::Message;
use proto::pb;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::sync::{mpsc, oneshot};

use crate::learn::context::Setup;
use crate::rank::ipc;
use crate::torch::NCCL_ENVIRONMENT;

/// Environment of every rank process.
///
/// glibc keeps the memory that a step gives back for the next one. By default it returns large pieces to the system at
/// once, and a batch costs more in page faults than in all that is done to its pixels. Threads of OpenMP sleep until
/// there is something to do: by default they take a core for that, which another rank or a decoder may need.
pub const RANK_ENVIRONMENT: [(&str, &str); 3] = [
    ("MALLOC_MMAP_THRESHOLD_", "1000000000"),
    ("MALLOC_TRIM_THRESHOLD_", "4000000000"),
    ("OMP_WAIT_POLICY", "PASSIVE"),
];

/// A log line's bytes; the rest is cut off.
const LONGEST_LINE: usize = 8 << 10;

/// An event of a rank process.
#[derive(Debug)]
pub(crate) struct RankEvent {
    pub device: usize,
    /// Counts the processes that this agent has started.
    pub process: u64,
    pub event: Event,
}

/// What has happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// It sent this.
    Message(pb::RankMessage),
    /// A line on its stderr.
    Line(String),
    /// It is gone.
    Exited(Exit),
}

/// How a process ended.
#[derive(Debug)]
pub(crate) enum Exit {
    /// By SIGKILL, which leaves no words.
    Killed,
    /// Its exit code, another signal, or why these are not known.
    Other(String),
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Killed => f.write_str("signal: 9 (SIGKILL)"),
            Self::Other(how) => f.write_str(how),
        }
    }
}

impl From<std::io::Result<ExitStatus>> for Exit {
    fn from(status: std::io::Result<ExitStatus>) -> Self {
        match status {
            Ok(status) if status.signal() == Some(9) => Self::Killed,
            Ok(status) => Self::Other(status.to_string()),
            Err(error) => Self::Other(error.to_string()),
        }
    }
}

/// A running rank process. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Process {
    messages: mpsc::UnboundedSender<Vec<u8>>,
    _kill: oneshot::Sender<()>,
}

impl Process {
    /// Starts `command` as a rank on a device, with those variables of `environment` that this process does not have.
    pub(crate) fn start(
        command: &[OsString],
        (setup, environment): (&Setup, Vec<(&'static str, String)>),
        (device, process): (usize, u64),
        events: &mpsc::Sender<RankEvent>,
    ) -> Result<Self> {
        let (program, arguments) = command.split_first().context("the command that starts a rank is empty")?;
        let mut command = Command::new(program);
        let mut child = command
            .args(arguments)
            .envs(environment.into_iter().filter(|(name, _)| std::env::var_os(name).is_none()))
            .envs(NCCL_ENVIRONMENT)
            .envs(RANK_ENVIRONMENT)
            // Ctrl-C in a terminal is for the agent, which lets its ranks leave in order.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("failed to start {}", program.to_string_lossy()))?;
        let (Some(mut stdin), Some(mut stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            anyhow::bail!("a rank process has no pipes");
        };
        // Few and small: what the coordinator says to one rank.
        let (to_rank, mut to_write) = mpsc::unbounded_channel::<Vec<u8>>();
        to_rank.send(serde_json::to_vec(setup)?)?;
        tokio::spawn(async move {
            while let Some(frame) = to_write.recv().await {
                if ipc::send(&mut stdin, &frame).await.is_err() {
                    return;
                }
            }
        });
        let tell = {
            let events = events.clone();
            move |event| {
                let events = events.clone();
                async move { events.send(RankEvent { device, process, event }).await.is_ok() }
            }
        };
        let messages = tokio::spawn({
            let tell = tell.clone();
            async move {
                while let Ok(Some(frame)) = ipc::receive(&mut stdout).await {
                    let Ok(message) = pb::RankMessage::decode(frame.as_slice()) else { return };
                    if !tell(Event::Message(message)).await {
                        return;
                    }
                }
            }
        });
        let lines = tokio::spawn({
            let tell = tell.clone();
            async move {
                let mut stderr = BufReader::new(stderr);
                while let Ok(Some(line)) = next_line(&mut stderr).await {
                    let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                    if !tell(Event::Line(text)).await {
                        return;
                    }
                }
            }
        });
        let (kill, killed) = oneshot::channel::<()>();
        tokio::spawn(async move {
            tokio::select! {
                _ = child.wait() => {}
                _ = killed => {
                    let _ = child.start_kill();
                }
            }
            let status = child.wait().await;
            // What it sent and wrote comes before its end.
            let _ = tokio::join!(messages, lines);
            tell(Event::Exited(status.into())).await;
        });
        Ok(Self { messages: to_rank, _kill: kill })
    }

    /// Sends a message. If the process is gone, that is an event of its own.
    pub(crate) fn send(&self, message: pb::coordinator_message::Message) {
        let message = pb::CoordinatorMessage { message: Some(message) };
        let _ = self.messages.send(message.encode_to_vec());
    }
}

/// The first bytes of the next line, however long it is; None after the last one.
async fn next_line(from: &mut (impl AsyncBufRead + Unpin)) -> std::io::Result<Option<Vec<u8>>> {
    let (mut line, mut begun) = (Vec::new(), false);
    loop {
        let read = from.fill_buf().await?;
        if read.is_empty() {
            return Ok(begun.then_some(line));
        }
        begun = true;
        let end = read.iter().position(|&byte| byte == b'\n');
        let piece = &read[..end.unwrap_or(read.len())];
        line.extend_from_slice(&piece[..piece.len().min(LONGEST_LINE - line.len())]);
        let used = end.map_or(read.len(), |end| end + 1);
        from.consume(used);
        if end.is_some() {
            return Ok(Some(line));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_told_apart_and_of_an_endless_one_the_beginning_is_kept() {
        let endless = "x".repeat(10 * LONGEST_LINE);
        let text = format!("one\n\n{endless}\nlast");
        let mut from = BufReader::with_capacity(1000, text.as_bytes());
        let mut lines = Vec::new();
        while let Some(line) = next_line(&mut from).await.expect("memory reads") {
            assert!(line.capacity() <= 2 * LONGEST_LINE);
            lines.push(String::from_utf8(line).expect("text"));
        }
        assert_eq!(lines, ["one", "", &endless[..LONGEST_LINE], "last"]);
    }
}
