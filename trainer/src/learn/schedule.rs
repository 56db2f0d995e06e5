//! The learning rate.

use proto::run_spec::{Schedule, Train};

/// The learning rate of step `step` (from 0): a linear rise to the peak, then the schedule.
pub(crate) fn learning_rate(step: u64, steps_per_epoch: u64, train: &Train) -> f64 {
    let per_epoch = steps_per_epoch as f64;
    let total = per_epoch * f64::from(train.epochs);
    let warmup = (per_epoch * train.warmup_epochs).min(total);
    let step = step as f64;
    if step < warmup {
        return train.learning_rate * ((step + 1.0) / warmup).min(1.0);
    }
    let factor = match train.schedule {
        Schedule::Constant => 1.0,
        Schedule::Step => 0.1_f64.powf((step / per_epoch / train.step_epochs).floor()),
        Schedule::Cosine => {
            let progress = ((step - warmup) / (total - warmup)).min(1.0);
            0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
        }
    };
    train.learning_rate * factor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_rises_and_falls_as_the_spec_says() {
        let mut train =
            Train { epochs: 4, learning_rate: 2.0, warmup_epochs: 1.0, step_epochs: 2.0, ..Train::default() };
        let rates = |train: &Train| -> Vec<f64> {
            [0, 1, 4, 9, 10, 25, 39].iter().map(|step| learning_rate(*step, 10, train)).collect()
        };
        train.schedule = Schedule::Constant;
        assert_eq!(rates(&train), [0.2, 0.4, 1.0, 2.0, 2.0, 2.0, 2.0]);
        train.schedule = Schedule::Step;
        assert_eq!(rates(&train), [0.2, 0.4, 1.0, 2.0, 2.0, 0.2, 0.2]);
        train.schedule = Schedule::Cosine;
        let last = 1.0 + (std::f64::consts::PI * 29.0 / 30.0).cos();
        for (rate, expected) in rates(&train).iter().zip([0.2, 0.4, 1.0, 2.0, 2.0, 1.0, last]) {
            assert!((rate - expected).abs() < 1e-12, "{rate} is not {expected}");
        }
    }
}
