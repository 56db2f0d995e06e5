//! Which worker's yield stands out, and which large site's. Pure.
//!
//! The URLs of one round are dealt at random: its slices of many sites yield about the same whoever makes them, and the
//! slices of one large site whenever they are made. What keeps far less than the rest has a cause of its own: the
//! worker's way out, or a site that has begun to refuse. URLs that have failed before are left aside.
//!
//! Sites lie whole in a slice, so that slices differ by more than chance among URLs would have it. How much they do is
//! measured within each worker's slices, or each part of a site's.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use proto::{DatasetId, OutcomeCounts, Rejection};

/// What a side must have before it is compared.
const LEAST_SLICES: usize = 3;
const LEAST_ASKED: u64 = 300;
/// What stands out keeps less by so much, and by so many standard errors.
const LEAST_DIFFERENCE: f64 = 0.2;
const STANDARD_ERRORS: f64 = 4.0;
/// Slices beyond those that are compared tell how much slices differ.
const LEAST_FREEDOM: f64 = 4.0;
/// A worker is judged by its latest slices, and a site by its own: by so many, or by more if they are small, up to the
/// most.
const OF_WORKER: usize = 8;
const OF_SITE: usize = 4;
const ASKED: u64 = 2 * LEAST_ASKED;
const MOST_SLICES: usize = 64;

/// URLs that somebody was asked for, and those of them that gave a sample.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Yield {
    pub(crate) asked: u64,
    pub(crate) kept: u64,
}

impl Yield {
    fn of(outcomes: &OutcomeCounts) -> Self {
        let not_asked = [Rejection::Unfetched, Rejection::ClassFull].map(|outcome| outcomes.of(Err(outcome)));
        Self { asked: outcomes.total() - not_asked.iter().sum::<u64>(), kept: outcomes.of(Ok(())) }
    }

    /// Of what was asked for, from 0 to 1.
    pub(crate) fn share(self) -> f64 {
        self.kept as f64 / self.asked.max(1) as f64
    }
}

/// What several slices have yielded.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    all: Yield,
    slices: usize,
    /// Of each slice, the square of what it kept, divided by what was asked for.
    squares: f64,
    /// How much slices differ within parts, of which each has one yield; and how many do.
    scatter: f64,
    freedom: f64,
}

impl Sum {
    fn add(&mut self, slice: Yield) {
        let Yield { asked, kept } = slice;
        self.all = Yield { asked: self.all.asked + asked, kept: self.all.kept + kept };
        self.slices += 1;
        self.squares += (kept as f64).powi(2) / asked as f64;
    }

    /// Of slices of one part.
    fn part(mut self) -> Self {
        if self.slices > 0 {
            self.scatter = self.squares - self.all.share() * self.all.kept as f64;
            self.freedom = (self.slices - 1) as f64;
        }
        self
    }

    fn with(self, other: Self) -> Self {
        Self {
            all: Yield { asked: self.all.asked + other.all.asked, kept: self.all.kept + other.all.kept },
            slices: self.slices + other.slices,
            squares: self.squares + other.squares,
            scatter: self.scatter + other.scatter,
            freedom: self.freedom + other.freedom,
        }
    }

    /// The rest, without a part of this.
    fn without(self, part: &Self) -> (Yield, usize) {
        let (asked, kept) = (self.all.asked - part.all.asked, self.all.kept - part.all.kept);
        (Yield { asked, kept }, self.slices - part.slices)
    }

    /// What the rest yields, if a part of this keeps far less.
    fn low(self, part: &Self) -> Option<Yield> {
        let (rest, slices) = self.without(part);
        let few = slices.min(part.slices) < LEAST_SLICES || rest.asked.min(part.all.asked) < LEAST_ASKED;
        if few || self.freedom < LEAST_FREEDOM {
            return None;
        }
        let share = self.all.share();
        // Of one URL: at least what chance alone makes.
        let variance = (self.scatter / self.freedom).max(share * (1.0 - share));
        let error = (variance * (1.0 / part.all.asked as f64 + 1.0 / rest.asked as f64)).sqrt();
        let difference = rest.share() - part.all.share();
        (difference >= LEAST_DIFFERENCE && difference > STANDARD_ERRORS * error).then_some(rest)
    }
}

/// The latest slices of a worker, or of a site.
#[derive(Debug, Default)]
struct Latest {
    slices: VecDeque<Yield>,
    sum: Sum,
}

impl Latest {
    /// Takes note of another one; those that are not among the latest `slices` any more.
    fn push(&mut self, slice: Yield, slices: usize) -> Vec<Yield> {
        self.slices.push_back(slice);
        let mut asked: u64 = self.slices.iter().map(|slice| slice.asked).sum();
        let mut old = Vec::new();
        while let Some(&oldest) = self.slices.front() {
            let enough = self.slices.len() > slices && asked - oldest.asked >= ASKED;
            if !enough && self.slices.len() <= MOST_SLICES {
                break;
            }
            asked -= oldest.asked;
            old.extend(self.slices.pop_front());
        }
        let mut sum = Sum::default();
        self.slices.iter().for_each(|slice| sum.add(*slice));
        self.sum = sum.part();
        old
    }
}

/// The slices of one large site: all, the latest, and those before, but for those of a time when it kept far less.
#[derive(Debug, Default)]
struct OfSite {
    all: Yield,
    before: Sum,
    latest: Latest,
}

impl OfSite {
    fn is_low(&self) -> bool {
        self.before.part().with(self.latest.sum).low(&self.latest.sum).is_some()
    }

    fn push(&mut self, slice: Yield) {
        self.all = Yield { asked: self.all.asked + slice.asked, kept: self.all.kept + slice.kept };
        let was_low = self.is_low();
        let old = self.latest.push(slice, OF_SITE);
        if !was_low {
            old.into_iter().for_each(|old| self.before.add(old));
        }
    }
}

/// The current round of a dataset.
#[derive(Debug, Default)]
struct OfRound {
    round: u32,
    workers: BTreeMap<String, Latest>,
    sites: HashMap<Arc<str>, OfSite>,
}

/// A worker that keeps far less than the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Low {
    pub(crate) worker: String,
    pub(crate) own: Yield,
    pub(crate) others: Yield,
}

/// What a large site has yielded in a round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct SiteYield {
    pub(crate) all: Yield,
    /// By its latest slices, if they keep far less than those before.
    pub(crate) lately: Option<Yield>,
}

/// What committed slices have yielded, of each dataset's current round.
#[derive(Debug, Default)]
pub(crate) struct Yields(HashMap<DatasetId, OfRound>);

impl Yields {
    /// Takes note of a slice that a worker has committed: one of many sites, or one of a large one.
    pub(crate) fn committed(
        &mut self,
        dataset: &DatasetId,
        round: u32,
        worker: &str,
        site: Option<&Arc<str>>,
        outcomes: &OutcomeCounts,
    ) {
        let slice = Yield::of(outcomes);
        let of = self.0.entry(dataset.clone()).or_default();
        if round > of.round {
            *of = OfRound { round, ..OfRound::default() };
        }
        if round < of.round || slice.asked == 0 {
            return;
        }
        match site {
            None => drop(of.workers.entry(worker.to_owned()).or_default().push(slice, OF_WORKER)),
            Some(site) => of.sites.entry(Arc::clone(site)).or_default().push(slice),
        }
    }

    /// The workers that keep far less than the others in slices of many sites.
    pub(crate) fn low(&self, dataset: &DatasetId) -> Vec<Low> {
        let Some(of) = self.0.get(dataset) else { return Vec::new() };
        let all = of.workers.values().fold(Sum::default(), |all, worker| all.with(worker.sum));
        let low = of.workers.iter().filter_map(|(worker, latest)| {
            let others = all.low(&latest.sum)?;
            Some(Low { worker: worker.clone(), own: latest.sum.all, others })
        });
        low.collect()
    }

    /// What a large site has yielded.
    pub(crate) fn site(&self, dataset: &DatasetId, site: &str) -> SiteYield {
        let of = self.0.get(dataset).and_then(|of| of.sites.get(site));
        of.map_or_else(SiteYield::default, |of| SiteYield {
            all: of.all,
            lately: of.is_low().then_some(of.latest.sum.all),
        })
    }

    /// Forgets workers that are gone, and datasets; which datasets' workers are others now.
    pub(crate) fn retain(
        &mut self,
        worker_is_there: impl Fn(&str) -> bool,
        dataset_is_there: impl Fn(&DatasetId) -> bool,
    ) -> Vec<DatasetId> {
        self.0.retain(|dataset, _| dataset_is_there(dataset));
        let mut others = Vec::new();
        for (dataset, of) in &mut self.0 {
            let before = of.workers.len();
            of.workers.retain(|worker, _| worker_is_there(worker));
            if of.workers.len() < before {
                others.push(dataset.clone());
            }
        }
        others
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn birds() -> DatasetId {
        "birds-1".parse().expect("an id")
    }

    fn outcomes(asked: u64, kept: u64) -> OutcomeCounts {
        // What nobody was asked for does not count.
        let others = [(Rejection::Timeout, asked - kept), (Rejection::Unfetched, 70), (Rejection::ClassFull, 900)];
        [(Ok(()), kept)].into_iter().chain(others.map(|(rejection, urls)| (Err(rejection), urls))).collect()
    }

    /// A worker commits slices of so many URLs, of which it keeps these.
    fn commit(yields: &mut Yields, worker: &str, asked: u64, kept: &[u64]) {
        kept.iter().for_each(|kept| yields.committed(&birds(), 1, worker, None, &outcomes(asked, *kept)));
    }

    fn low(yields: &Yields) -> Vec<String> {
        yields.low(&birds()).into_iter().map(|low| low.worker).collect()
    }

    #[test]
    fn a_worker_that_keeps_far_less_than_the_others_stands_out_until_it_keeps_as_much_or_is_gone() {
        let mut yields = Yields::default();
        for worker in ["w1", "w2"] {
            commit(&mut yields, worker, 500, &[300, 320, 280]);
        }
        commit(&mut yields, "w3", 500, &[20, 30]);
        assert_eq!(low(&yields), Vec::<String>::new(), "two slices say too little");
        commit(&mut yields, "w3", 500, &[10]);
        let own = Yield { asked: 1500, kept: 60 };
        let others = Yield { asked: 3000, kept: 1800 };
        assert_eq!(yields.low(&birds()), [Low { worker: "w3".to_owned(), own, others }]);
        let slices = (1..20).find(|_| {
            commit(&mut yields, "w3", 500, &[300]);
            low(&yields).is_empty()
        });
        assert!(slices.is_some_and(|slices| slices <= 8), "{slices:?} slices until it is as good as the others");

        commit(&mut yields, "w2", 500, &[0; 8]);
        assert_eq!(low(&yields), ["w2"]);
        assert_eq!(yields.retain(|_| true, |_| true), []);
        assert_eq!(yields.retain(|worker| worker != "w2", |_| true), [birds()]);
        assert_eq!(low(&yields), Vec::<String>::new());
        assert_eq!(yields.retain(|_| true, |_| false), []);
        assert!(yields.0.is_empty());
    }

    #[test]
    fn what_is_little_or_small_or_of_another_round_does_not_stand_out() {
        let mut yields = Yields::default();
        commit(&mut yields, "w1", 50, &[30; 5]);
        commit(&mut yields, "w2", 50, &[0; 5]);
        assert_eq!(low(&yields), Vec::<String>::new(), "250 URLs");
        commit(&mut yields, "w1", 50, &[30]);
        commit(&mut yields, "w2", 50, &[0]);
        assert_eq!(low(&yields), ["w2"], "small slices do as well, if there are enough");
        let mut yields = Yields::default();
        commit(&mut yields, "w1", 9000, &[5400, 5500, 5300, 5400]);
        commit(&mut yields, "w2", 9000, &[3700, 3800, 3700, 3800]);
        assert_eq!(low(&yields), Vec::<String>::new(), "18 points are certain, but not much");
        commit(&mut yields, "w3", 9000, &[0; 4]);
        assert_eq!(low(&yields), ["w3"]);
        yields.committed(&birds(), 2, "w3", None, &outcomes(500, 0));
        commit(&mut yields, "w1", 9000, &[9000; 8]);
        assert_eq!(low(&yields), Vec::<String>::new(), "each round begins anew, and an older one is over");
    }

    #[test]
    fn workers_whose_slices_differ_widely_by_themselves_do_not_stand_out() {
        // From 10 to 90 %, as where a few sites make a slice.
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % 800
        };
        let (mut yields, mut told) = (Yields::default(), 0);
        let workers: Vec<String> = (0..50).map(|n| format!("w{n}")).collect();
        for _ in 0..40 {
            for worker in &workers {
                commit(&mut yields, worker, 1000, &[100 + random()]);
            }
            told += low(&yields).len();
        }
        assert!(told <= 4, "{told} of 2000 times");
        // One that truly yields nothing does.
        commit(&mut yields, "w9", 1000, &[0; 8]);
        assert_eq!(low(&yields), ["w9"]);
    }

    #[test]
    fn half_of_the_workers_without_a_way_out_stand_out_beside_the_other_half() {
        let mut yields = Yields::default();
        for (worker, kept) in [("w1", 300), ("w2", 310), ("w3", 0), ("w4", 5)] {
            commit(&mut yields, worker, 500, &[kept; 4]);
        }
        assert_eq!(low(&yields), ["w3", "w4"]);
    }

    #[test]
    fn a_large_site_that_begins_to_refuse_stands_out_against_its_own_past() {
        let (mut yields, site) = (Yields::default(), Arc::<str>::from("flickr.com"));
        let commit = |yields: &mut Yields, kept| {
            yields.committed(&birds(), 1, "w1", Some(&site), &outcomes(600, kept));
        };
        (0..20).for_each(|n| commit(&mut yields, 400 + n));
        let told = yields.site(&birds(), "flickr.com");
        assert_eq!((told.all.asked, told.lately), (12_000, None));
        let slices = (1..20).find(|_| {
            commit(&mut yields, 3);
            yields.site(&birds(), "flickr.com").lately.is_some()
        });
        assert!(slices.is_some_and(|slices| slices <= 4), "{slices:?} slices until it is told");
        (0..100).for_each(|_| commit(&mut yields, 3));
        assert_eq!(yields.site(&birds(), "flickr.com").lately, Some(Yield { asked: 2400, kept: 12 }), "it goes on");
        (0..4).for_each(|_| commit(&mut yields, 390));
        assert_eq!(yields.site(&birds(), "flickr.com").lately, None, "it answers again");
        assert_eq!(yields.site(&birds(), "photos.com"), SiteYield::default());
        assert_eq!(low(&yields), Vec::<String>::new());
    }
}
