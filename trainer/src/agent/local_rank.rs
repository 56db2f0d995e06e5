//! A rank on one of the agent's devices.

use std::time::{Duration, Instant};

use proto::pb::{self, left::Cause};
use proto::trace;
use tracing::Span;

use super::last_lines::LastLines;
use super::process::Process;

/// A rank process, and what is known of it.
pub(super) struct LocalRank {
    pub(super) id: u64,
    pub(super) process: Process,
    pub(super) run: String,
    pub(super) generation: u64,
    pub(super) rank: u32,
    pub(super) joined: bool,
    /// The span of its generation, until it has left that.
    pub(super) span: Span,
    /// The newest one.
    pub(super) heartbeat: pb::RankHeartbeat,
    pub(super) last_heard: Instant,
    /// The newest lines that it wrote on stderr.
    pub(super) last_lines: LastLines,
}

impl LocalRank {
    /// Ends the span of the generation, unless it has ended already.
    pub(super) fn end_span(&mut self, cause: Cause, detail: &str) {
        let span = std::mem::replace(&mut self.span, Span::none());
        span.record("step", trace::integer(self.heartbeat.step)).record("left", cause.as_str_name());
        if matches!(cause, Cause::Collective | Cause::Error | Cause::Exited | Cause::Diverged) {
            trace::failed(&span, detail);
        }
    }

    /// For how long nothing was heard of it.
    pub(super) fn silence(&self) -> Duration {
        self.last_heard.elapsed()
    }

    /// The agent was held up for so long, so that it could hear nothing: that is not the rank's silence.
    pub(super) fn discount(&mut self, stall: Duration) {
        self.last_heard = Instant::now().min(self.last_heard + stall);
    }
}
