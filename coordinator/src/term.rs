//! Terms: one coordinator's time in office. Each coordinator begins by creating the next term's object, and ends when
//! it hears of a higher term than its own.

use std::sync::OnceLock;

use anyhow::Context;
use proto::keys;
use proto::term::TermRecord;
use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::store::{Created, Store, nonce, wall_millis};

/// This coordinator's term, and what ends it.
#[derive(Debug)]
pub(crate) struct Term {
    /// The number.
    pub(crate) number: u64,
    over: CancellationToken,
    reason: OnceLock<String>,
}

impl Term {
    /// Creates the object of the next term. Whoever else starts at the same moment gets another number, and the higher
    /// one fences the lower.
    pub(crate) async fn begin(store: &Store) -> anyhow::Result<Self> {
        let nonce = nonce();
        let highest = highest(store).await?;
        for number in highest + 1.. {
            let record = TermRecord {
                format: 1,
                term: number,
                nonce: nonce.clone(),
                at_millis: wall_millis(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            };
            if store.create(&keys::term(number), &record).await? == Created::Won {
                return Ok(Self { number, over: CancellationToken::new(), reason: OnceLock::new() });
            }
        }
        anyhow::bail!("no term is left")
    }

    /// Takes note of a term that a caller has seen: a higher one ends this term.
    pub(crate) fn observe(&self, seen: u64) -> Result<(), Error> {
        if seen <= self.number {
            return Ok(());
        }
        let error = Error::Fenced { own: self.number, seen };
        self.end(error.to_string());
        Err(error)
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
        match store.get(&keys::term(self.number + 1)).await? {
            None => Ok(()),
            Some(_) => self.observe(self.number + 1),
        }
    }
}

async fn highest(store: &Store) -> anyhow::Result<u64> {
    let listed = store.list(keys::TERMS).await.context("failed to list the terms")?;
    Ok(listed.iter().filter_map(|key| keys::number(key).ok()).max().unwrap_or(0))
}
