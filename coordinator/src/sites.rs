//! The budgets of sites, as an operator sets them, and which slices of a dataset are of which large site. Pure.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use proto::round::Round;
use proto::site::{self, Budget, Named, Sites};

/// Settings of what all workers together may ask of one site: a registrable domain with all names under it, or an
/// address or name without a domain with its port.
#[derive(Debug, Clone, clap::Args)]
pub struct SiteBudgets {
    /// Requests that all workers together may have open at one site
    #[arg(long, alias = "host-slots", env = "GLEANER_SITE_SLOTS", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65536), value_name = "N")]
    pub site_slots: u32,
    /// Requests per second that all workers together may send to one site at the most. How many it bears is learned: it
    /// begins with 2, which double every five seconds until it answers 429. 0: as many as it bears and its slots carry
    #[arg(long, alias = "host-rate", env = "GLEANER_SITE_RATE", default_value_t = 100.0, value_parser = rate, value_name = "PER_SECOND")]
    pub site_rate: f64,
    /// Another budget for a site, or for a name with all names under it: flickr.com=4 or flickr.com=4/20 (slots,
    /// requests per second), which it is known to bear; may be repeated, the longest name that fits counts
    #[arg(
        long,
        alias = "host-budget",
        env = "GLEANER_SITE_BUDGET",
        value_delimiter = ',',
        value_name = "SITE=SLOTS[/RATE]"
    )]
    pub site_budget: Vec<Named>,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (0.0..=1e6).contains(&rate) => Ok(rate),
        _ => Err("must be a number of requests per second, 0 to 1000000".to_owned()),
    }
}

impl Default for SiteBudgets {
    fn default() -> Self {
        let Budget { slots, rate, .. } = Budget::default();
        Self { site_slots: slots, site_rate: rate, site_budget: Vec::new() }
    }
}

impl From<SiteBudgets> for Sites {
    fn from(budgets: SiteBudgets) -> Self {
        let default = Budget { slots: budgets.site_slots, rate: budgets.site_rate, borne: false };
        Self::new(default, site::profiles().iter().cloned().chain(budgets.site_budget))
    }
}

/// Which slices of a dataset are of one large site alone; every other one has URLs of many.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Deal {
    /// By the number of the first slice; none of the ranges is empty, and no two have a slice in common.
    large: BTreeMap<u32, (Range<u32>, Arc<str>)>,
}

impl Deal {
    pub(crate) fn new(rounds: &[Round]) -> Self {
        let mut names: BTreeMap<&str, Arc<str>> = BTreeMap::new();
        let mut large = BTreeMap::new();
        for site in rounds.iter().filter_map(|round| round.large_sites.as_ref()).flatten() {
            let name = names.entry(&site.site).or_insert_with(|| site.site.as_str().into());
            large.insert(site.first_slice, (site.shards(), Arc::clone(name)));
        }
        Self { large }
    }

    /// The site that all URLs of a slice are of; None: it has URLs of many.
    pub(crate) fn site(&self, shard: u32) -> Option<&Arc<str>> {
        let (_, (shards, site)) = self.large.range(..=shard).next_back()?;
        shards.contains(&shard).then_some(site)
    }

    /// The large sites, each with some of its slices; a site may come several times.
    pub(crate) fn large(&self) -> impl Iterator<Item = (&Arc<str>, Range<u32>)> {
        self.large.values().map(|(shards, site)| (site, shards.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::round::{Cause, LargeSite, Slice};

    #[test]
    fn slices_are_of_one_site_or_of_many_and_those_of_older_rounds_always_of_many() {
        let round = |first_slice, slices: usize, large_sites| Round {
            format: 1,
            nonce: String::new(),
            request_id: String::new(),
            traceparent: String::new(),
            cause: Cause::Request,
            round: 1,
            first_slice,
            accepts_damage: false,
            slices: vec![Slice { urls: 1, sha256: String::new(), once: false }; slices],
            large_sites,
            first_key: 0,
            new_urls: 0,
            urls_per_class: BTreeMap::new(),
            retried: Default::default(),
            keys: 0,
            not_chosen: 0,
            known: 0,
            repeated: 0,
            several: 0,
            bad_lines: 0,
            bad_line_examples: Vec::new(),
        };
        let site = |site: &str, first_slice, slices| LargeSite { site: site.to_owned(), first_slice, slices };
        let dealt = vec![site("b.com", 15, 2), site("a.com", 12, 3)];
        let deal = Deal::new(&[round(0, 10, None), round(10, 9, Some(dealt)), round(20, 1, Some(Vec::new()))]);
        for (shard, of) in [(3, None), (11, None), (14, Some("a.com")), (15, Some("b.com")), (17, None), (20, None)] {
            assert_eq!(deal.site(shard).map(|site| &**site), of, "{shard}");
        }
        assert_eq!(deal.large().map(|(_, shards)| shards).collect::<Vec<_>>(), [12..15, 15..17]);
    }

    #[test]
    fn what_an_operator_sets_counts_more_than_a_profile() {
        let budgets =
            SiteBudgets { site_budget: vec!["flickr.com=3/9".parse().expect("a budget")], ..Default::default() };
        let sites = Sites::from(budgets);
        assert_eq!(sites.budget("flickr.com"), Budget { slots: 3, rate: 9.0, borne: true });
        assert_eq!(sites.place("live.staticflickr.com").site, "flickr.com");
    }
}
