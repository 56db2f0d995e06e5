//! One URL of a list on its way to a body, over redirects and retries.

use std::ops::Range;
use std::time::Duration;

use proto::outcomes::LONGEST_URL;
use proto::site::host_of_url;
use proto::{Limits, Rejection};
use url::Url;

use super::net::permits_port;
use super::retry::FetchError;
use crate::opt_out::Respect;

/// What the responses to a request said, beside the body.
#[derive(Debug, Default)]
pub(crate) struct ResponseInfo {
    /// Where redirects led, if there were any.
    pub(crate) final_url: Option<String>,
    /// Of the last response.
    pub(crate) status: Option<u16>,
    /// Which signal said no, or which file of the site could not be had.
    pub(crate) detail: Option<&'static str>,
}

/// A request for the picture behind a URL.
#[derive(Debug)]
pub(crate) struct Request {
    /// What is asked for next: the list's URL, or where a redirect led.
    pub(super) url: Url,
    /// The URLs that answered with a redirect, the list's first.
    redirected: Vec<Url>,
    pub(crate) info: ResponseInfo,
    /// The time that its HTTP requests have taken; waiting for a host or a backoff does not count.
    pub(crate) spent: Duration,
    /// The latest answer has not come to its end: its server may still be at work on it.
    pub(crate) is_open: bool,
    retries: u32,
    pub(super) respect: Respect,
    /// Of what is behind the URL, the bytes that are asked for; None: all.
    pub(super) part: Option<Range<u64>>,
}

impl Request {
    pub(crate) fn new(url: &str) -> Result<Self, Rejection> {
        if url.len() > LONGEST_URL {
            return Err(Rejection::BadUrl);
        }
        let url = Url::parse(url).map_err(|_| Rejection::BadUrl)?;
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
            return Err(Rejection::BadUrl);
        }
        if !url.port().is_none_or(permits_port) {
            return Err(Rejection::BadUrl);
        }
        let (info, respect) = (ResponseInfo::default(), Respect::default());
        let (redirected, spent, is_open, retries) = (Vec::new(), Duration::ZERO, false, 0);
        Ok(Self { url, redirected, info, spent, is_open, retries, respect, part: None })
    }

    /// For some of the bytes of what is behind a URL.
    pub(crate) fn of_part(url: &str, part: Range<u64>) -> Result<Self, Rejection> {
        if part.is_empty() {
            return Err(Rejection::TooSmall);
        }
        Ok(Self { part: Some(part), ..Self::new(url)? })
    }

    /// The same, of an owner who may say no by these signals.
    pub(crate) fn respecting(self, respect: Respect) -> Self {
        Self { respect, ..self }
    }

    /// What is asked for next.
    pub(crate) fn url(&self) -> &Url {
        &self.url
    }

    pub(crate) fn respect(&self) -> Respect {
        self.respect
    }

    /// Whether redirects have led elsewhere.
    pub(crate) fn is_redirected(&self) -> bool {
        !self.redirected.is_empty()
    }

    /// The host that is asked next, as budgets name it.
    pub(crate) fn host(&self) -> String {
        host_of_url(&self.url)
    }

    /// Follows a redirect.
    pub(super) fn redirect(&mut self, to: Url, limits: &Limits) -> Result<(), FetchError> {
        self.redirected.push(std::mem::replace(&mut self.url, to));
        if self.redirected.len() > limits.redirects as usize || self.redirected.contains(&self.url) {
            return Err(FetchError::of_url(Rejection::RedirectLimit));
        }
        self.info.final_url = Some(self.url.to_string());
        Ok(())
    }

    /// Begins again with the list's URL if the error's policy says so; returns the backoff before that. `random` is in
    /// 0..1.
    pub(crate) fn retry(&mut self, error: &FetchError, limits: &Limits, random: f64) -> Option<Duration> {
        let backoff = error.backoff(self.retries, self.spent, limits, random)?;
        self.retries += 1;
        self.begin_again();
        Some(backoff)
    }

    /// Begins again with the list's URL.
    pub(crate) fn begin_again(&mut self) {
        if !self.redirected.is_empty() {
            self.url = self.redirected.swap_remove(0);
            self.redirected.clear();
        }
        self.info = ResponseInfo::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retry_begins_with_the_url_of_the_list() {
        let limits = Limits::default();
        let mut request = Request::new("http://a.example/x.jpg").expect("a URL");
        let to = Url::parse("https://b.example:444/y.jpg").expect("a URL");
        request.redirect(to, &limits).expect("one is allowed");
        assert_eq!(request.host(), "b.example:444");
        request.retry(&FetchError::of_host(Rejection::Timeout), &limits, 0.5).expect("it gets one");
        assert_eq!((request.host().as_str(), request.redirected.len()), ("a.example", 0));
    }

    #[test]
    fn ports_that_speak_something_else_are_no_urls_of_pictures() {
        for bad in ["http://a.example:22/x.jpg", "https://a.example:25/x.jpg", "ftp://a.example/"] {
            assert_eq!(Request::new(bad).map(|_| ()), Err(Rejection::BadUrl), "{bad}");
        }
        assert!(Request::new("http://a.example:8080/x.jpg").is_ok() && Request::new("https://a.example:443/").is_ok());
    }

    #[test]
    fn http_and_https_share_a_host_and_so_does_the_rooted_name() {
        for same in ["http://a.example/", "https://A.example/", "http://a.example.:80/", "http://u:p@a.example/"] {
            assert_eq!(Request::new(same).expect("a URL").host(), "a.example", "{same}");
        }
        assert_eq!(Request::new("http://[::1]:8080/").expect("a URL").host(), "[::1]:8080");
    }
}
