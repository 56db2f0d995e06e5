//! What coordinators leave to those that follow them, so that a restart costs neither time nor what was learned of
//! sites: whether parts of sites' budgets may still be in use, and the rates that sites bear.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::handover::{Handover, LearnedSite};
use proto::{Stored, keys};
use tracing::warn;

use crate::store::{Store, StoreError, wall_millis};

/// Between two writes.
const PERIOD: Duration = Duration::from_secs(60);

/// What is older is forgotten: sites change.
const FORGET_MILLIS: u64 = 30 * 24 * 3600 * 1000;

/// Reads what the coordinators before `term` have left. If it cannot be read, that is told, and nothing is known: it is
/// no reason not to begin.
///
/// # Errors
/// If the store cannot be listed.
pub(crate) async fn read(store: &Store, term: u64) -> Result<Handover, StoreError> {
    let earlier = |keys: Vec<String>| {
        let numbers = keys.into_iter().filter_map(|key| keys::number(&key).ok());
        numbers.filter(|number| *number < term).max()
    };
    let before = earlier(store.list(keys::TERMS).await?);
    let nothing = |all_back| Handover { format: 1, term, at_millis: 0, all_back, sites: BTreeMap::new() };
    let Some(latest) = earlier(store.list(keys::HANDOVERS).await?) else { return Ok(nothing(before.is_none())) };
    let key = keys::handover(latest);
    let read = match store.get(&key).await {
        Ok(Some(json)) => Handover::from_json(&json).map_err(|error| error.to_string()),
        Ok(None) => return Ok(nothing(false)),
        Err(error) => Err(error.to_string()),
    };
    match read {
        Ok(left) => Ok(Handover {
            // Only the last one before this one can know that nothing is lent.
            all_back: left.all_back && left.term == latest && before == Some(latest),
            sites: if wall_millis() < left.at_millis + FORGET_MILLIS { left.sites } else { BTreeMap::new() },
            ..left
        }),
        Err(error) => {
            warn!(key, error, "what is known of sites cannot be read; it is learned anew");
            Ok(nothing(false))
        }
    }
}

/// Writes what `now` says, again and again, for ever.
pub(crate) async fn keep(store: Store, now: impl Fn() -> Handover) {
    let mut written = now().sites;
    loop {
        tokio::time::sleep(PERIOD).await;
        let handover = now();
        if handover.sites != written && write(&store, &handover).await {
            written = handover.sites;
        }
    }
}

/// Writes it, and removes what it takes the place of. Returns whether that succeeded; nobody's work hangs on it.
pub(crate) async fn write(store: &Store, handover: &Handover) -> bool {
    let key = keys::handover(handover.term);
    let written = async {
        store.put(&key, handover.to_json().into()).await?;
        let earlier = store.list(keys::HANDOVERS).await?.into_iter();
        let earlier = earlier.filter(|key| keys::number(key).is_ok_and(|number| number < handover.term));
        store.delete_all(earlier.collect()).await
    };
    let written = written.await;
    if let Err(error) = &written {
        warn!(key, %error, "failed to write what is known of sites");
    }
    written.is_ok()
}

/// A site as it is written.
pub(crate) fn site(rate: (f64, bool), quiet: Duration) -> LearnedSite {
    let quiet = u64::try_from(quiet.as_millis()).unwrap_or(u64::MAX);
    let quiet_until_millis = if quiet > 0 { wall_millis().saturating_add(quiet) } else { 0 };
    LearnedSite { requests_per_second: rate.0, known: rate.1, quiet_until_millis }
}

/// For how long a site that was written wants to be left alone now. No clock is trusted further than an hour.
pub(crate) fn quiet(site: &LearnedSite) -> Duration {
    Duration::from_millis(site.quiet_until_millis.saturating_sub(wall_millis())).min(Duration::from_secs(3600))
}
