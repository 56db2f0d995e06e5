//! The retry policy: whether a request that failed is sent again and after which backoff, and what its failure says of
//! the host.

use std::time::Duration;

use proto::{Limits, Rejection};
use reqwest::StatusCode;
use reqwest::header::{DATE, HeaderMap, HeaderValue, RETRY_AFTER};

use crate::hosts::HostSignal;

/// Before the first retry; it doubles with each.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);

/// Why a URL has no body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FetchError {
    pub(crate) rejection: Rejection,
    pub(super) retry: Retry,
    pub(crate) signal: HostSignal,
    /// What it was about, if that was not the URL itself.
    pub(crate) detail: Option<&'static str>,
}

/// Whether a retry may come further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Retry {
    Never,
    /// Not before the server wants it (`Retry-After`).
    After(Duration),
    /// As soon as the host may be asked again: it said nothing of the URL.
    WithHost,
}

impl From<Rejection> for FetchError {
    /// It stays, and says nothing of the host.
    fn from(rejection: Rejection) -> Self {
        Self { rejection, retry: Retry::Never, signal: HostSignal::Unknown, detail: None }
    }
}

impl FetchError {
    /// The host, or the way to it, is at fault.
    pub(super) fn of_host(rejection: Rejection) -> Self {
        let retry = Retry::After(Duration::ZERO);
        Self { retry, signal: HostSignal::Failed, ..rejection.into() }
    }

    /// The URL alone is at fault: its host answers.
    pub(super) fn of_url(rejection: Rejection) -> Self {
        Self { signal: HostSignal::Answered, ..rejection.into() }
    }

    /// Earlier requests or other bodies used the URL's time up.
    pub(super) fn out_of_time() -> Self {
        Rejection::Timeout.into()
    }

    /// The same, said of something else than the URL.
    pub(crate) fn about(self, what: &'static str) -> Self {
        Self { detail: Some(what), ..self }
    }

    pub(super) fn of_status(status: StatusCode, headers: &HeaderMap) -> Self {
        let wanted = retry_after(headers).unwrap_or_default();
        let rejection = Rejection::HttpStatus;
        match status {
            StatusCode::NOT_FOUND | StatusCode::GONE => Self::of_url(Rejection::NotFound),
            StatusCode::TOO_MANY_REQUESTS => {
                let cooldown = wanted.max(FIRST_BACKOFF);
                Self { retry: Retry::WithHost, signal: HostSignal::Throttled(cooldown), ..rejection.into() }
            }
            // It is the URL that has to wait.
            StatusCode::SERVICE_UNAVAILABLE if !wanted.is_zero() => {
                Self { retry: Retry::After(wanted), signal: HostSignal::Busy, ..rejection.into() }
            }
            _ if status.is_server_error() => Self { retry: Retry::After(wanted), ..Self::of_host(rejection) },
            _ => Self::of_url(rejection),
        }
    }

    /// Whether the host, and not the URL, was refused: the request does not count as a try.
    pub(crate) fn waits_for_host(&self) -> bool {
        self.retry == Retry::WithHost
    }

    /// The backoff before the next retry of a URL that has had `retries` and whose requests took `spent`; none if it
    /// gets no more. A backoff longer than a URL's whole time is for another round. `random` is in 0..1.
    pub(super) fn backoff(&self, retries: u32, spent: Duration, limits: &Limits, random: f64) -> Option<Duration> {
        let Retry::After(wanted) = self.retry else { return None };
        let backoff = FIRST_BACKOFF * 2u32.saturating_pow(retries.min(16));
        let backoff = backoff.mul_f64(0.5 + random / 2.0).max(wanted);
        // With less than half of its time it would hardly come further than it did.
        let gets_one = retries < limits.retries && spent <= limits.timeout() / 2 && backoff <= limits.timeout();
        gets_one.then_some(backoff)
    }
}

/// `Retry-After`: seconds, or a date, which is compared with the server's own clock (`Date`).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).map(str::trim);
    let wanted = text(RETRY_AFTER)?;
    if let Ok(seconds) = wanted.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = |text| httpdate::parse_http_date(text).ok();
    date(wanted)?.duration_since(date(text(DATE)?)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date_by_the_servers_own_clock() {
        let parse = |pairs: &[(&str, &str)]| {
            let pairs =
                pairs.iter().map(|(name, value)| (name.parse().expect("a name"), value.parse().expect("a value")));
            retry_after(&HeaderMap::from_iter(pairs))
        };
        assert_eq!(parse(&[("retry-after", " 120")]), Some(Duration::from_secs(120)));
        let date = [("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT"), ("date", "Wed, 21 Oct 2015 07:27:30 GMT")];
        assert_eq!(parse(&date), Some(Duration::from_secs(30)));
        assert_eq!(parse(&date[..1]), None, "without the server's clock a date says nothing");
        assert_eq!(parse(&[("retry-after", "soon")]), None);
        assert_eq!(parse(&[("retry-after", "99999999999999999999999")]), None);
        assert_eq!(parse(&[]), None);
    }

    #[test]
    fn retries_come_with_growing_backoffs_within_their_number_the_time_and_what_the_server_wants() {
        let limits = Limits::default();
        let status = |code: u16, after: Option<&str>| {
            let headers = after.map(|value| (RETRY_AFTER, value.parse().expect("a value")));
            FetchError::of_status(StatusCode::from_u16(code).expect("a status"), &headers.into_iter().collect())
        };
        let connect = FetchError::of_host(Rejection::Connect);
        let (soon, late) = (Duration::ZERO, Duration::from_secs(16));
        assert_eq!(connect.backoff(0, soon, &limits, 0.0), Some(Duration::from_millis(500)));
        assert_eq!(connect.backoff(1, soon, &limits, 1.0), Some(Duration::from_secs(2)));
        assert_eq!(connect.backoff(2, soon, &limits, 0.0), None, "two retries");
        assert_eq!(connect.backoff(0, late, &limits, 0.0), None, "half of its time is gone");

        let first = |error: FetchError| error.backoff(0, soon, &limits, 0.0);
        assert_eq!(first(status(503, Some("7"))), Some(Duration::from_secs(7)));
        assert_eq!(first(status(503, Some("3600"))), None, "longer than a URL's whole time");
        assert!(status(429, None).waits_for_host() && !status(503, Some("7")).waits_for_host());
        for never in [status(404, Some("1")), status(410, None), status(403, None), Rejection::Tls.into()] {
            assert_eq!(first(never), None, "{never:?}");
        }
        assert_eq!(status(429, Some("3600")).signal, HostSignal::Throttled(Duration::from_secs(3600)));
        assert_eq!(status(429, None).signal, HostSignal::Throttled(FIRST_BACKOFF));
        assert_eq!(status(503, Some("7")).signal, HostSignal::Busy);
        assert_eq!((status(500, None).signal, status(403, None).signal), (HostSignal::Failed, HostSignal::Answered));
    }
}
