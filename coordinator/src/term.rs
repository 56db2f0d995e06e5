//! Terms: one coordinator's time in office. Each coordinator begins by creating the next term's object, and ends once
//! the store holds a higher one. That somebody says so is only a reason to look there.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::Context;
use proto::keys;
use proto::term::TermRecord;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::error::Error;
use crate::ledger::Now;
use crate::store::{Created, Store, StoreError, nonce, wall_millis};

/// A store that was restored from a backup lacks the terms since then. Nobody has seen one that is further ahead.
const FURTHEST_AHEAD: u64 = 10_000;

/// This coordinator's term, and what ends it.
#[derive(Debug)]
pub(crate) struct Term {
    number: AtomicU64,
    pub(crate) clock: Clock,
    /// The highest one of which a caller has said that it has begun.
    heard: AtomicU64,
    heard_higher: Notify,
    over: CancellationToken,
    reason: OnceLock<String>,
    /// When the store was last asked about higher terms, and had none.
    checked: Mutex<Now>,
}

impl Term {
    /// Creates the object of the next term. Whoever else starts at the same moment gets another number, and the higher
    /// one fences the lower.
    pub(crate) async fn begin(store: &Store, clock: Clock) -> anyhow::Result<Self> {
        let highest = highest(store).await.context("failed to list the terms")?;
        for number in highest + 1.. {
            let asked = clock.now();
            if create(store, number).await? {
                return Ok(Self {
                    number: number.into(),
                    clock,
                    heard: number.into(),
                    heard_higher: Notify::new(),
                    over: CancellationToken::new(),
                    reason: OnceLock::new(),
                    checked: asked.into(),
                });
            }
        }
        anyhow::bail!("no term is left")
    }

    /// The number.
    pub(crate) fn number(&self) -> u64 {
        self.number.load(Ordering::Relaxed)
    }

    /// Takes note of a term that a caller has seen. After a higher one it has to wait until the store was asked about
    /// that: see [`Term::heard_higher`].
    pub(crate) fn observe(&self, seen: u64) -> Result<(), Error> {
        let own = self.number();
        if seen <= own {
            return Ok(());
        }
        if seen > own + FURTHEST_AHEAD {
            return Err(Error::Invalid(format!("term_seen = {seen}: no such term has begun, this one's is {own}")));
        }
        self.heard.fetch_max(seen, Ordering::Relaxed);
        self.heard_higher.notify_one();
        Err(Error::HeardHigher { own, seen })
    }

    /// Waits until a caller has seen a higher term, and returns the highest.
    pub(crate) async fn heard_higher(&self) -> u64 {
        loop {
            let heard = self.heard.load(Ordering::Relaxed);
            if heard > self.number() {
                return heard;
            }
            self.heard_higher.notified().await;
        }
    }

    /// Looks for a higher term of which this coordinator has heard. If it is in the store, this term is over. If not,
    /// the store has been restored from a backup that is older: this coordinator begins again above that term. Returns
    /// its number then.
    pub(crate) async fn rise_above(&self, heard: u64, store: &Store) -> Result<u64, Error> {
        self.check(store).await?;
        let number = heard + 1;
        match create(store, number).await? {
            true => Ok(number),
            false => Err(self.fenced(number)),
        }
    }

    /// Goes on under a higher number, whose object is this coordinator's.
    pub(crate) fn rise(&self, number: u64) {
        self.number.store(number, Ordering::Relaxed);
    }

    /// For how long a later term may have begun of which this coordinator does not know.
    pub(crate) fn unchecked(&self) -> Duration {
        self.clock.now().saturating_sub(*self.checked.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Ends this coordinator: the process exits with the reason.
    pub(crate) fn end(&self, reason: String) {
        self.reason.get_or_init(|| reason);
        self.over.cancel();
    }

    /// Returns once the term is over, with the reason.
    pub(crate) async fn ended(&self) -> String {
        self.over.cancelled().await;
        self.reason.get().cloned().unwrap_or_default()
    }

    /// Ends the term if the store holds a higher one. Nothing new may be committed unless this is Ok.
    pub(crate) async fn check(&self, store: &Store) -> Result<(), Error> {
        let (own, asked, seen) = (self.number(), self.clock.now(), highest(store).await?);
        if seen <= own {
            let mut checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
            *checked = asked.max(*checked);
            return Ok(());
        }
        Err(self.fenced(seen))
    }

    fn fenced(&self, seen: u64) -> Error {
        let error = Error::Fenced { own: self.number(), seen };
        self.end(error.to_string());
        error
    }
}

/// Puts the object of a term. False: somebody else has.
async fn create(store: &Store, number: u64) -> Result<bool, StoreError> {
    let record = TermRecord {
        format: 1,
        term: number,
        nonce: nonce(),
        at_millis: wall_millis(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    Ok(store.create(&keys::term(number), &record).await? == Created::Won)
}

/// Numbers are not dense: one that rose above what it had heard has left some out.
async fn highest(store: &Store) -> Result<u64, StoreError> {
    let listed = store.list(keys::TERMS).await?;
    Ok(listed.iter().filter_map(|key| keys::number(key).ok()).max().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use object_store::memory::InMemory;

    use super::*;

    async fn begun() -> (Store, Term) {
        let store = Store::new(Arc::new(InMemory::new()));
        let term = Term::begin(&store, Clock::machine()).await.expect("a store that works");
        (store, term)
    }

    #[tokio::test]
    async fn hearsay_ends_nobody_and_a_term_in_the_store_does() {
        let (store, term) = begun().await;
        assert!(term.observe(1).is_ok());
        assert!(matches!(term.observe(u64::MAX), Err(Error::Invalid(_))));
        assert!(matches!(term.observe(3), Err(Error::HeardHigher { own: 1, seen: 3 })));
        assert_eq!(term.heard_higher().await, 3);
        assert!(!term.over.is_cancelled());
        // A later one than what was heard of has begun since.
        assert!(create(&store, 4).await.expect("a store that works"));
        assert!(matches!(term.rise_above(3, &store).await, Err(Error::Fenced { own: 1, seen: 4 })));
        assert!(term.ended().await.contains("term 4 has begun"));
    }

    #[tokio::test]
    async fn above_a_term_that_the_store_has_lost_it_begins_again_and_fences_who_began_before() {
        let (store, old) = begun().await;
        let term = Term::begin(&store, Clock::machine()).await.expect("a store that works");
        let _ = term.observe(6);
        let number = term.rise_above(term.heard_higher().await, &store).await.expect("a store that works");
        assert_eq!(number, 7);
        term.rise(7);
        assert!(term.observe(6).is_ok() && term.check(&store).await.is_ok());
        assert!(matches!(old.check(&store).await, Err(Error::Fenced { own: 1, seen: 7 })));
        assert_eq!(Term::begin(&store, Clock::machine()).await.expect("a store that works").number(), 8);
    }
}
