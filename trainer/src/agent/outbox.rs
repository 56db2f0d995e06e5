//! Reports of this agent's ranks to the coordinator. Each is kept until it is acknowledged, and sent again over the
//! next stream.

use std::collections::VecDeque;

use proto::metric::MetricKind;
use proto::pb::{self, rank_message::Message};

/// Reports that are not acknowledged, in order.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    reports: VecDeque<pb::RankMessage>,
    /// How many of them have been sent over the current stream.
    sent: usize,
    sequence: u64,
}

impl Outbox {
    /// Adds a report. Only the newest step of a device is kept among unsent reports; the curve's points are in the
    /// store as well.
    pub(super) fn push(&mut self, mut report: pb::RankMessage) {
        if let Some(Message::Stepped(newest)) = &mut report.message {
            let mut unsent = self.reports.split_off(self.sent);
            unsent.retain_mut(|other| match &mut other.message {
                Some(Message::Stepped(older)) if other.device == report.device => {
                    older.metrics.retain(|point| point.kind != MetricKind::Step.name());
                    newest.metrics.splice(0..0, older.metrics.drain(..));
                    false
                }
                _ => true,
            });
            self.reports.append(&mut unsent);
        }
        self.sequence += 1;
        report.sequence = self.sequence;
        self.reports.push_back(report);
    }

    /// Sends unsent reports until `send` returns false.
    pub(super) fn send(&mut self, send: impl Fn(&pb::RankMessage) -> bool) {
        while self.reports.get(self.sent).is_some_and(&send) {
            self.sent += 1;
        }
    }

    /// The stream has ended: all unacknowledged reports are sent again.
    pub(super) fn rewind(&mut self) {
        self.sent = 0;
    }

    /// Forgets all reports.
    pub(super) fn clear(&mut self) {
        (self.reports, self.sent) = (VecDeque::new(), 0);
    }

    /// Removes the reports up to this number.
    pub(super) fn acknowledged(&mut self, sequence: u64) {
        while self.reports.front().is_some_and(|report| report.sequence <= sequence) {
            self.reports.pop_front();
            self.sent = self.sent.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    fn report(device: u32, message: Message) -> pb::RankMessage {
        pb::RankMessage { run: "r".into(), device, message: Some(message), ..Default::default() }
    }

    fn stepped(step: u64, kind: &str) -> Message {
        let point = pb::Metric { kind: kind.into(), step, ..Default::default() };
        Message::Stepped(pb::Stepped { step, metrics: vec![point] })
    }

    /// What goes out, if the stream takes so many.
    fn sent(outbox: &mut Outbox, most: usize) -> Vec<u64> {
        let out = RefCell::new(Vec::new());
        outbox.send(|report| {
            let takes = out.borrow().len() < most;
            if takes {
                out.borrow_mut().push(report.sequence);
            }
            takes
        });
        out.into_inner()
    }

    #[test]
    fn a_report_goes_out_over_each_stream_until_it_is_acknowledged() {
        let mut outbox = Outbox::default();
        (0..3).for_each(|_| outbox.push(report(0, Message::Left(pb::Left::default()))));
        assert_eq!(sent(&mut outbox, 2), [1, 2]);
        assert_eq!(sent(&mut outbox, 9), [3]);
        outbox.acknowledged(1);
        assert_eq!(sent(&mut outbox, 9), [0; 0]);
        outbox.rewind();
        assert_eq!(sent(&mut outbox, 9), [2, 3]);
        outbox.push(report(0, Message::Left(pb::Left::default())));
        outbox.acknowledged(3);
        assert_eq!(sent(&mut outbox, 9), [4]);
    }

    #[test]
    fn steps_that_wait_are_one_report_which_keeps_the_points_of_epochs() {
        let mut outbox = Outbox::default();
        outbox.push(report(0, stepped(1, "step")));
        assert_eq!(sent(&mut outbox, 9), [1]);
        for (step, kind) in [(2, "step"), (3, "validation"), (4, "step")] {
            outbox.push(report(0, stepped(step, kind)));
        }
        outbox.push(report(1, stepped(4, "step")));
        assert_eq!(sent(&mut outbox, 9), [4, 5], "that which has gone out stays as it is");
        let Some(Message::Stepped(newest)) = &outbox.reports[1].message else { panic!("a step") };
        let points: Vec<u64> = newest.metrics.iter().map(|point| point.step).collect();
        assert_eq!((newest.step, points), (4, vec![3, 4]));
    }
}
