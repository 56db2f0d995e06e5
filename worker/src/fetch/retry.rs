//! Whether a request that failed is worth another try, and what its failure says of the host.

use std::time::Duration;

use proto::Rejection;
use reqwest::StatusCode;
use reqwest::header::{DATE, HeaderMap, HeaderValue, RETRY_AFTER};

use crate::hosts::Ending;

/// Before the second try; each pause after it is twice as long.
pub(super) const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest time for which one 429 silences its whole host.
const LONGEST_HUSH: Duration = Duration::from_secs(60);

/// A request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) rejection: Rejection,
    pub(crate) again: Again,
    /// What it says about the host.
    pub(crate) ending: Ending,
}

/// Whether another try may come further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    Never,
    /// If the server has so much time (`Retry-After`).
    After(Duration),
}

impl From<Rejection> for Failure {
    /// One that stays, whatever the host.
    fn from(rejection: Rejection) -> Self {
        Self { rejection, again: Again::Never, ending: Ending::Unknown }
    }
}

impl Failure {
    /// Of the way to the host, or of the host itself.
    pub(super) fn of_host(rejection: Rejection) -> Self {
        Self { rejection, again: Again::After(Duration::ZERO), ending: Ending::Failed }
    }

    /// Of the time that a URL has in all, which others have used up.
    pub(super) fn of_haste() -> Self {
        Self { rejection: Rejection::Timeout, again: Again::Never, ending: Ending::Unknown }
    }

    /// Of the one URL: its host answers.
    pub(super) fn of_url(rejection: Rejection) -> Self {
        Self { rejection, again: Again::Never, ending: Ending::Answered }
    }

    pub(super) fn of_status(status: StatusCode, headers: &HeaderMap) -> Self {
        let wish = retry_after(headers).unwrap_or_default();
        match status {
            StatusCode::NOT_FOUND | StatusCode::GONE => Self::of_url(Rejection::NotFound),
            StatusCode::TOO_MANY_REQUESTS => {
                let pause = wish.clamp(FIRST_PAUSE, LONGEST_HUSH);
                Self { rejection: Rejection::HttpStatus, again: Again::After(wish), ending: Ending::Limited(pause) }
            }
            _ if status.is_server_error() => Self { again: Again::After(wish), ..Self::of_host(Rejection::HttpStatus) },
            _ => Self::of_url(Rejection::HttpStatus),
        }
    }
}

/// `Retry-After`: seconds, or a date, which is compared with the server's own clock (`Date`).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).map(str::trim);
    let wish = text(RETRY_AFTER)?;
    if let Ok(seconds) = wish.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = |text| httpdate::parse_http_date(text).ok();
    date(wish)?.duration_since(date(text(DATE)?)?).ok()
}

#[cfg(test)]
mod tests {
    use super::super::journey::Journey;
    use super::*;
    use proto::Limits;

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
    fn what_may_pass_is_tried_again_with_growing_pauses_within_tries_time_and_patience() {
        let limits = Limits::default();
        let journey = || Journey::new("http://a.example/x.jpg").expect("a URL");
        let status = |code: u16, after: Option<&str>| {
            let headers = after.map(|value| (RETRY_AFTER, value.parse().expect("a value")));
            Failure::of_status(StatusCode::from_u16(code).expect("a status"), &headers.into_iter().collect())
        };
        let mut trip = journey();
        let connect = Failure::of_host(Rejection::Connect);
        assert_eq!(trip.try_again(&connect, &limits, 0.0), Some(Duration::from_millis(500)));
        assert_eq!(trip.try_again(&connect, &limits, 1.0), Some(Duration::from_secs(2)));
        assert_eq!(trip.try_again(&connect, &limits, 0.0), None, "two further tries");

        let mut late = Journey { spent: Duration::from_secs(16), ..journey() };
        assert_eq!(late.try_again(&connect, &limits, 0.0), None, "half of its time is gone");

        let after = |failure: Failure| journey().try_again(&failure, &limits, 0.0);
        assert_eq!(after(status(503, Some("7"))), Some(Duration::from_secs(7)));
        assert_eq!(after(status(503, Some("3600"))), None, "longer than a URL's whole time");
        assert_eq!(after(status(429, None)), Some(Duration::from_millis(500)));
        for never in [status(404, Some("1")), status(410, None), status(403, None), Rejection::Tls.into()] {
            assert_eq!(after(never), None, "{never:?}");
        }
        assert_eq!(status(429, Some("3600")).ending, Ending::Limited(LONGEST_HUSH));
        assert_eq!((status(500, None).ending, status(403, None).ending), (Ending::Failed, Ending::Answered));
    }
}
