//! What a rank reports of its generation.

use std::collections::HashMap;
use std::sync::mpsc::Sender;

use proto::metric::MetricPoint;
use proto::pb::{self, rank_message};

/// Sends a rank's messages to its agent.
#[derive(Debug, Clone)]
pub(crate) struct Reports {
    pub run: String,
    pub generation: u64,
    pub rank: u32,
    pub to: Sender<pb::RankMessage>,
}

impl Reports {
    fn send(&self, message: rank_message::Message) {
        let Self { run, generation, rank, to } = self;
        // If the receiver is gone, the process is about to exit.
        let _ = to.send(pb::RankMessage {
            run: run.clone(),
            generation: *generation,
            rank: *rank,
            message: Some(message),
            ..Default::default()
        });
    }

    pub(crate) fn joined(&self, step: u64, steps_per_epoch: u64, damaged: Vec<pb::Damaged>) {
        self.send(rank_message::Message::Joined(pb::Joined { step, steps_per_epoch, damaged }));
    }

    pub(crate) fn stepped(&self, step: u64, point: Option<MetricPoint>) {
        let metrics = point.into_iter().map(pb::Metric::from).collect();
        self.send(rank_message::Message::Stepped(pb::Stepped { step, metrics }));
    }

    pub(crate) fn checkpointed(&self, made: pb::Checkpointed) {
        self.send(rank_message::Message::Checkpointed(made));
    }

    pub(crate) fn finished(&self, key: String, digests: HashMap<String, String>) {
        self.send(rank_message::Message::Finished(pb::Finished { key, digests }));
    }

    pub(crate) fn left(&self, left: pb::Left) {
        self.send(rank_message::Message::Left(left));
    }
}
