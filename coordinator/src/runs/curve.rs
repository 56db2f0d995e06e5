//! A run's learning curve as it is held in memory.

use std::collections::BTreeMap;

use proto::metric::MetricKind;
use proto::pb;

/// Points of single steps that are held for one run; beyond it every other one is dropped.
const MOST_STEP_POINTS: usize = 4096;

/// The kinds of points, in the order in which they are measured at one step.
const KINDS: [MetricKind; 4] = [MetricKind::Step, MetricKind::Train, MetricKind::Validation, MetricKind::Test];

/// The points of each kind by their step.
#[derive(Debug, Clone, Default)]
pub(super) struct Curve([BTreeMap<u64, pb::Metric>; KINDS.len()]);

impl Curve {
    /// Adds a point. After a return to a checkpoint steps are done again: of two points of one kind and step that of
    /// the higher generation stands.
    pub(super) fn add(&mut self, point: pb::Metric) {
        let Some(kind) = KINDS.iter().position(|kind| kind.name() == point.kind) else { return };
        let points = &mut self.0[kind];
        if points.get(&point.step).is_some_and(|other| other.generation > point.generation) {
            return;
        }
        points.insert(point.step, point);
        if KINDS[kind] == MetricKind::Step && points.len() > MOST_STEP_POINTS {
            let mut n = 0;
            points.retain(|_, _| {
                n += 1;
                n % 2 == 0
            });
        }
    }

    /// Adds all points of another curve.
    pub(super) fn merge(&mut self, other: Self) {
        other.0.into_iter().flat_map(BTreeMap::into_values).for_each(|point| self.add(point));
    }

    /// The newest point of a kind.
    pub(super) fn newest(&self, kind: MetricKind) -> Option<pb::Metric> {
        let points = KINDS.iter().zip(&self.0).find(|(of, _)| **of == kind)?.1;
        points.last_key_value().map(|(_, point)| point.clone())
    }

    /// The newest point of each kind that has one.
    pub(super) fn newest_of_each(&self) -> Vec<pb::Metric> {
        self.0.iter().filter_map(|points| points.last_key_value().map(|(_, point)| point.clone())).collect()
    }

    /// The points of these kinds, or of all if none is named, in the order of their steps.
    pub(super) fn points(&self, kinds: &[String]) -> Vec<pb::Metric> {
        let wanted = |(kind, _): &(&MetricKind, _)| kinds.is_empty() || kinds.iter().any(|name| name == kind.name());
        let chosen = KINDS.iter().zip(&self.0).filter(wanted);
        let mut points: Vec<pb::Metric> = chosen.flat_map(|(_, points)| points.values().cloned()).collect();
        points.sort_by_key(|point| point.step);
        points
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(kind: &str, generation: u64, step: u64, loss: f64) -> pb::Metric {
        pb::Metric { kind: kind.to_owned(), generation, step, loss, ..pb::Metric::default() }
    }

    #[test]
    fn points_come_in_the_order_of_steps_and_a_higher_generation_replaces_a_lower_one() {
        let mut curve = Curve::default();
        for (kind, generation, step, loss) in
            [("test", 1, 3, 9.0), ("step", 2, 3, 2.0), ("step", 1, 3, 1.0), ("train", 1, 3, 5.0), ("step", 1, 1, 4.0)]
        {
            curve.add(point(kind, generation, step, loss));
        }
        let all: Vec<(u64, f64)> = curve.points(&[]).iter().map(|point| (point.step, point.loss)).collect();
        assert_eq!(all, [(1, 4.0), (3, 2.0), (3, 5.0), (3, 9.0)]);
        assert_eq!(curve.points(&["train".to_owned()]).len(), 1);
        assert_eq!(curve.newest(MetricKind::Step).map(|point| point.loss), Some(2.0));
        assert_eq!((curve.newest(MetricKind::Validation), curve.newest_of_each().len()), (None, 3));
    }

    #[test]
    fn a_long_curve_is_thinned_where_it_is_dense_and_keeps_its_newest_point() {
        let mut curve = Curve::default();
        (1..=20_000).for_each(|step| curve.add(point("step", 1, step, 0.0)));
        (1..=50).for_each(|epoch| curve.add(point("validation", 1, epoch * 400, 0.0)));
        let steps = curve.points(&["step".to_owned()]);
        assert!(steps.len() <= MOST_STEP_POINTS && steps.len() > MOST_STEP_POINTS / 2, "{}", steps.len());
        assert_eq!(steps.last().map(|point| point.step), Some(20_000));
        assert_eq!(curve.points(&["validation".to_owned()]).len(), 50);
    }
}
