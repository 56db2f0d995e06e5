//! The ranks of a generation agree on a state.

use std::future::Future;
use std::pin::pin;

use anyhow::{Context, Result};
use proto::pb;
use proto::run_ledger::Line;
use tch::Tensor;
use tokio::runtime::Handle;
use tracing::{info, warn};

use super::checkpoint::{self, Best, Progress, Rows};
use super::failure::Failure;
use super::history::Sums;
use super::job::{Job, fresh};
use super::membership::{Membership, PATIENCE};
use crate::data::store::is_damage;
use crate::torch::{Group, Op};

/// Makes sure that all ranks hold the same state: that of the lowest rank among those that have come furthest; if none
/// holds any, what rank 0 finds in the newest whole checkpoint, or the weights that the run starts from. Returns the
/// checkpoints that rank 0 found damaged.
pub(super) fn agree(job: &mut Job, membership: &Membership, join: &pb::Join) -> Result<Vec<pb::Damaged>, Failure> {
    let Membership { group, rank, world, .. } = membership;
    let mine = if job.has_state { job.progress.step as i64 + 1 } else { 0 };
    let agreed = if job.has_state { job.agreed_generation as i64 } else { 0 };
    let [furthest, nearest, newest, oldest] = largest(group, [mine, -mine, agreed, -agreed])?;
    let same = furthest > 0 && (furthest, newest) == (-nearest, -oldest);
    let mut damaged = Vec::new();
    let root = if furthest == 0 {
        let runtime = job.context.runtime.clone();
        let loading = (*rank == 0).then(|| load(job, join));
        damaged = while_others_wait(&runtime, group, loading)?.transpose()?.unwrap_or_default();
        0
    } else {
        let vote = if mine == furthest { world - rank } else { 0 };
        world - largest(group, [vote as i64])?[0] as usize
    };
    if !same {
        // A broadcast that is interrupted leaves a mixture, which is a state only if both were the same.
        job.has_state &= mine == furthest;
        let tensors: Vec<Tensor> = job.tensors().into_iter().map(|(_, tensor)| tensor).collect();
        group.broadcast(&tensors, root)?;
    }
    job.progress = broadcast_progress(group, &job.progress, root)?;
    (job.has_state, job.agreed_generation) = (true, join.generation);
    Ok(damaged)
}

async fn load(job: &mut Job, join: &pb::Join) -> Result<Vec<pb::Damaged>> {
    (job.model, job.sgd) = fresh(&job.spec, &job.manifest, job.device);
    job.progress = Progress::default();
    let mut damaged = Vec::new();
    for pb::Checkpointed { key, digests, .. } in &join.checkpoints {
        match checkpoint::read(&job.context.store, key, digests).await {
            Ok((position, tensors)) => {
                job.progress = position.progress(key, job.steps_per_epoch)?;
                checkpoint::load(&job.tensors(), &tensors).with_context(|| key.clone())?;
                return Ok(damaged);
            }
            Err(error) if is_damage(&error) => {
                let reason = format!("{error:#}");
                warn!(key, reason, "a checkpoint is damaged; the one before is taken");
                damaged.push(pb::Damaged { key: key.clone(), reason });
            }
            Err(error) => return Err(error),
        }
    }
    if let Some(pb::StartWeights { key, digests, rows, by_class }) = &join.start {
        let tensors = checkpoint::read_tensors(&job.context.store, key, digests).await?;
        let rows = if *by_class { Rows::OfClasses(rows) } else { Rows::AllOrNone };
        checkpoint::take_weights(&job.weights(), &tensors, &rows).with_context(|| key.clone())?;
        info!(key, "begins with other weights");
    }
    Ok(damaged)
}

/// How a state is sent of which none was measured.
const NO_BEST: Best = Best { step: 0, top1: -1.0, epoch: 0 };

/// The largest over all ranks of each of these.
pub(super) fn largest<const N: usize>(group: &Group, mine: [i64; N]) -> Result<[i64; N], Failure> {
    let values = Tensor::from_slice(&mine);
    group.all_reduce(&values, Op::Max)?.wait(group.timeout())?;
    Ok(std::array::from_fn(|i| values.int64_value(&[i as i64])))
}

/// Does `work`, which rank 0 alone has, while the other ranks wait for as long as that takes: with a slow store it may
/// outlast the timeout of a collective. An abort ends it soon.
pub(super) fn while_others_wait<T>(
    runtime: &Handle,
    group: &Group,
    work: Option<impl Future<Output = T>>,
) -> Result<Option<T>, Failure> {
    let mut work = pin!(work);
    // Often enough that a rank whose peers are lost leaves before it counts as one that hangs.
    let often = group.timeout() / (2 * PATIENCE);
    loop {
        let done = work.as_mut().as_pin_mut().and_then(|work| {
            // A timeout is made within the runtime whose clock it has.
            runtime.block_on(async { tokio::time::timeout(often, work).await.ok() })
        });
        if largest(group, [i64::from(done.is_some())])?[0] > 0 {
            return Ok(done);
        }
    }
}

fn broadcast_progress(group: &Group, mine: &Progress, root: usize) -> Result<Progress, Failure> {
    let Progress { step, validated, sums, tail, best } = mine;
    let Best { step: best_step, top1, epoch } = best.unwrap_or(NO_BEST);
    let head = Tensor::from_slice(&[*step, *validated, tail.len() as u64, best_step, epoch].map(|n| n as i64));
    let totals = Tensor::from_slice(&[sums.loss, sums.top1, sums.top5, sums.samples, top1]);
    group.broadcast(&[head.shallow_clone()], root)?;
    group.broadcast(&[totals.shallow_clone()], root)?;
    let head = |i| head.int64_value(&[i]);
    let of = |line: &Line| [line.epoch as i64, line.step as i64, line.samples as i64, line.digest as i64];
    let mut lines: Vec<i64> = tail.iter().flat_map(of).collect();
    lines.resize(4 * head(2) as usize, 0);
    let lines = Tensor::from_slice(&lines);
    if head(2) > 0 {
        group.broadcast(&[lines.shallow_clone()], root)?;
    }
    let line = |i: i64| {
        let at = |column| lines.int64_value(&[4 * i + column]) as u64;
        Line { epoch: at(0), step: at(1), samples: at(2), digest: at(3) }
    };
    let total = |i| totals.double_value(&[i]);
    Ok(Progress {
        step: head(0) as u64,
        validated: head(1) as u64,
        sums: Sums { loss: total(0), top1: total(1), top5: total(2), samples: total(3) },
        tail: (0..head(2)).map(line).collect(),
        best: (total(4) >= 0.0).then(|| Best { step: head(3) as u64, top1: total(4), epoch: head(4) as u64 }),
    })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use tch::Device;

    use super::*;
    use crate::torch::{Member, Store};

    /// Ranks of a crowded machine meet within it, too.
    const TIMEOUT: Duration = Duration::from_secs(3);

    /// What two ranks come away with from work of rank 0 that takes so long. Its group may be aborted meanwhile.
    fn shared(work: Duration, abort: Option<Duration>) -> Vec<Result<Option<&'static str>, Failure>> {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let store = Store::serve("127.0.0.1").expect("loopback");
        let rank = |rank: usize| {
            let member =
                Member { rank, world: 2, address: "127.0.0.1".to_owned(), device: Device::Cpu, timeout: TIMEOUT };
            let group = Group::join("127.0.0.1", store.port(), member, || false).expect("both come");
            if let Some(after) = abort.filter(|_| rank == 0) {
                let aborter = group.aborter();
                std::thread::spawn(move || {
                    std::thread::sleep(after);
                    aborter.abort().expect("gloo can");
                });
            }
            let work = (rank == 0).then_some(async {
                tokio::time::sleep(work).await;
                "done"
            });
            while_others_wait(runtime.handle(), &group, work)
        };
        std::thread::scope(|scope| {
            let ranks = [0, 1].map(|number| scope.spawn(move || rank(number)));
            ranks.map(|rank| rank.join().expect("no panic")).into()
        })
    }

    #[test]
    fn ranks_wait_for_rank_0_beyond_the_timeout_of_a_collective_but_not_beyond_an_abort() {
        let waited = shared(TIMEOUT + Duration::from_secs(1), None);
        assert!(matches!(waited[..], [Ok(Some("done")), Ok(None)]), "{waited:?}");
        let begun = Instant::now();
        let aborted = shared(60 * TIMEOUT, Some(TIMEOUT / 8));
        assert!(matches!(aborted[..], [Err(Failure::Collective(_)), Err(Failure::Collective(_))]), "{aborted:?}");
        assert!(begun.elapsed() < 30 * TIMEOUT, "{:?}", begun.elapsed());
    }
}
