//! A URL on its way to its body, over several hops and tries.

use std::time::Duration;

use proto::outcomes::LONGEST_URL;
use proto::{Limits, Rejection};
use url::Url;

use super::body::Body;
use super::retry::{Again, FIRST_PAUSE, Failure};

/// What was learned of a URL on the way to its body.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    /// Where redirects led, if there were any.
    pub(crate) final_url: Option<String>,
    /// Of the last answer.
    pub(crate) status: Option<u16>,
}

/// A URL on its way to its body: over several hops and tries, with pauses between them.
#[derive(Debug)]
pub(crate) struct Journey {
    /// The next hop.
    pub(super) url: Url,
    pub(super) visited: Vec<Url>,
    pub(crate) trace: Trace,
    /// The time that its requests have taken; waiting for a host or for another try does not count.
    pub(crate) spent: Duration,
    /// Tries that have failed.
    failures: u32,
}

impl Journey {
    pub(crate) fn new(url: &str) -> Result<Self, Rejection> {
        if url.len() > LONGEST_URL {
            return Err(Rejection::BadUrl);
        }
        let url = Url::parse(url).map_err(|_| Rejection::BadUrl)?;
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
            return Err(Rejection::BadUrl);
        }
        Ok(Self { url, visited: Vec::new(), trace: Trace::default(), spent: Duration::ZERO, failures: 0 })
    }

    /// The host of the next hop, as budgets name it.
    pub(crate) fn host(&self) -> String {
        host_of(&self.url)
    }

    /// Begins anew after a failure, if that is worth while: after which pause. A pause that is longer than a URL's whole time
    /// is for another round. `random` is in 0..1.
    pub(crate) fn try_again(&mut self, failure: &Failure, limits: &Limits, random: f64) -> Option<Duration> {
        let Again::After(wish) = failure.again else { return None };
        let backoff = FIRST_PAUSE * 2u32.saturating_pow(self.failures.min(16));
        let pause = backoff.mul_f64(0.5 + random / 2.0).max(wish);
        // With less than half of its time it would hardly come further than it did.
        if self.failures >= limits.retries || self.spent > limits.timeout() / 2 || pause > limits.timeout() {
            return None;
        }
        self.failures += 1;
        if !self.visited.is_empty() {
            self.url = self.visited.swap_remove(0);
            self.visited.clear();
        }
        self.trace = Trace::default();
        Some(pause)
    }
}

pub(super) fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let host = host.strip_suffix('.').unwrap_or(host);
    match url.port() {
        Some(port) if port != 80 && port != 443 => format!("{host}:{port}"),
        _ => host.to_owned(),
    }
}

/// How far a request came.
#[derive(Debug)]
pub(crate) enum Step {
    Body(Body),
    /// A redirect to another host.
    Elsewhere,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_further_try_begins_where_the_list_says() {
        let mut journey = Journey::new("http://a.example/x.jpg").expect("a URL");
        let next = Url::parse("https://b.example:444/y.jpg").expect("a URL");
        journey.visited.push(std::mem::replace(&mut journey.url, next));
        assert_eq!(journey.host(), "b.example:444");
        journey.try_again(&Failure::of_host(Rejection::Timeout), &Limits::default(), 0.5).expect("a try is left");
        assert_eq!((journey.host().as_str(), journey.visited.len()), ("a.example", 0));
    }

    #[test]
    fn http_and_https_share_a_host_and_so_does_the_rooted_name() {
        for same in ["http://a.example/", "https://A.example/", "http://a.example.:80/", "http://u:p@a.example/"] {
            assert_eq!(Journey::new(same).expect("a URL").host(), "a.example", "{same}");
        }
        assert_eq!(Journey::new("http://[::1]:8080/").expect("a URL").host(), "[::1]:8080");
    }
}
