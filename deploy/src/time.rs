//! Moments and spans of time for people.

use std::time::{Duration, UNIX_EPOCH};

/// Milliseconds since 1970, by this machine's clock.
#[allow(clippy::disallowed_methods, reason = "nothing is decided by it; it is shown to people")]
pub(crate) fn now_millis() -> u64 {
    UNIX_EPOCH.elapsed().map_or(0, |since| since.as_millis() as u64)
}

/// A moment in UTC, given in milliseconds since 1970: `2026-05-04T12:30:07Z`.
pub(crate) fn moment(millis: u64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(millis)).to_string()
}

/// A span in its two largest units: `45s`, `12m30s`, `3h5m`, `2d4h`.
pub(crate) fn span(millis: u64) -> String {
    let seconds = millis / 1000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match () {
        () if days > 0 => format!("{days}d{}h", hours % 24),
        () if hours > 0 => format!("{hours}h{}m", minutes % 60),
        () if minutes > 0 => format!("{minutes}m{}s", seconds % 60),
        () => format!("{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_two_units_and_moments_are_in_utc() {
        let spans = [999, 45_000, 750_000, 11_100_000, 187_200_000].map(span);
        assert_eq!(spans, ["0s", "45s", "12m30s", "3h5m", "2d4h"]);
        assert_eq!(moment(1_777_897_807_999), "2026-05-04T12:30:07Z");
    }
}
