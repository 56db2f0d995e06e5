//! Why a URL gave no sample.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What became of one URL of the catalog in one round: kept, or exactly one reason why not.
pub type Outcome = Result<(), Rejection>;

/// The name of the outcome in logs, metrics, Parquet and the command line: `kept`, or the rejection's name.
pub fn outcome_name(outcome: Outcome) -> &'static str {
    outcome.map_or_else(Rejection::name, |()| KEPT)
}

/// The name of the outcome of a URL that gave a sample.
pub const KEPT: &str = "kept";

/// The outcome of that name.
///
/// # Errors
/// If there is none that this program knows.
pub fn parse_outcome(name: &str) -> Result<Outcome, UnknownOutcome> {
    if name == KEPT { Ok(Ok(())) } else { name.parse().map(Err) }
}

macro_rules! rejections {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// One reason why a URL gave no sample. The names are stable: they stand in Parquet files and dashboards.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Rejection {
            $($(#[doc = $doc])+ #[serde(rename = $name)] $variant,)+
        }

        impl Rejection {
            /// Every rejection, in the order in which a URL meets them on its way.
            pub const ALL: &[Rejection] = &[$(Rejection::$variant),+];

            /// The stable name.
            pub fn name(self) -> &'static str {
                match self { $(Rejection::$variant => $name),+ }
            }
        }

        impl FromStr for Rejection {
            type Err = UnknownOutcome;

            fn from_str(name: &str) -> Result<Self, Self::Err> {
                match name {
                    $($name => Ok(Rejection::$variant),)+
                    _ => Err(UnknownOutcome(name.to_owned())),
                }
            }
        }
    };
}

rejections! {
    /// The line has no URL that can be parsed, its scheme is neither http nor https (of imported files: file), or its
    /// port is one of those that browsers do not ask because something else is spoken there (22, 25 ...).
    BadUrl = "bad_url",
    /// Its class had enough samples already, so it was not fetched.
    ClassFull = "class_full",
    /// Its host failed so often that no more was asked of it in this round.
    HostGivenUp = "host_given_up",
    /// The host's name does not resolve.
    Dns = "dns",
    /// The host's name, or a redirect's, resolves to an address that workers may not reach (private, loopback, metadata
    /// ...); or a file is in none of the folders that they may import from, or behind a link.
    BlockedAddress = "blocked_address",
    /// No connection: refused, unreachable, or not established in time.
    Connect = "connect",
    /// The TLS handshake failed.
    Tls = "tls",
    /// The URL's total deadline passed, whatever it was waiting for.
    Timeout = "timeout",
    /// The server broke HTTP: garbage, a reset, a body cut short of its length.
    Protocol = "protocol",
    /// More redirects than allowed, or a loop.
    RedirectLimit = "redirect_limit",
    /// 404 or 410, or no such file: the picture is gone.
    NotFound = "not_found",
    /// The file, or what of it is the picture, cannot be read.
    Unreadable = "unreadable",
    /// Any other status than 200.
    HttpStatus = "http_status",
    /// The owner said by a [signal](crate::Signal) that machines must not take the picture, or must not learn from it.
    OptedOut = "opted_out",
    /// More bytes than allowed, before or after decompression.
    TooLarge = "too_large",
    /// Fewer bytes than allowed (5,000 unless the dataset says otherwise).
    TooSmall = "too_small",
    /// The bytes are no image of a known format.
    NotAnImage = "not_an_image",
    /// A picture in a format that is not read: HEIC, AVIF, JPEG XL, JPEG 2000 or SVG.
    UnsupportedFormat = "unsupported_format",
    /// The bytes are not those that the list names by their digest.
    Changed = "changed",
    /// The bytes or the pixels are those of a known "no longer available" picture.
    Placeholder = "placeholder",
    /// More pixels than allowed, known from the header before anything is decoded.
    TooManyPixels = "too_many_pixels",
    /// The shorter side has fewer pixels than allowed.
    TooFewPixels = "too_few_pixels",
    /// The longer side is more than so many times the shorter one.
    Aspect = "aspect",
    /// The image stops before its end.
    Truncated = "truncated",
    /// It says that it is an image, but cannot be decoded.
    Undecodable = "undecodable",
    /// All pixels have nearly the same colour.
    Flat = "flat",
    /// Nobody got to it in this round: its site wants to be asked later, its worker was told to leave or lost its way
    /// out, or its slice failed. A later round fetches it.
    Unfetched = "unfetched",
    /// It failed its workers again and again, alone in its slice.
    SliceFailed = "slice_failed",
}

impl Rejection {
    /// Whether another try, perhaps days later, may give a sample: what failed was a name server, a network, a server
    /// that had trouble, or this cluster. A name that leads to a private address today, as behind a captive portal, may
    /// lead elsewhere tomorrow. `http_status` is that of the last answer, if there was one.
    /// [`Rejection::ClassFull`] is no failure: such a URL is opened when its class turns out to be short.
    pub fn is_transient(self, http_status: Option<i32>) -> bool {
        match self {
            Self::HostGivenUp
            | Self::Dns
            | Self::Connect
            | Self::Tls
            | Self::Timeout
            | Self::Protocol
            | Self::BlockedAddress
            | Self::Unreadable
            | Self::Unfetched
            | Self::SliceFailed => true,
            // Request Timeout, Too Early, Too Many Requests, and all that the server blames on itself (RFC 9110, 8470,
            // 6585).
            Self::HttpStatus => matches!(http_status, Some(408 | 425 | 429 | 500..=599)),
            Self::BadUrl
            | Self::ClassFull
            | Self::RedirectLimit
            | Self::NotFound
            | Self::OptedOut
            | Self::TooLarge
            | Self::TooSmall
            | Self::NotAnImage
            | Self::UnsupportedFormat
            | Self::Changed
            | Self::Placeholder
            | Self::TooManyPixels
            | Self::TooFewPixels
            | Self::Aspect
            | Self::Truncated
            | Self::Undecodable
            | Self::Flat => false,
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that names no outcome.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no outcome's name")]
pub struct UnknownOutcome(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_in_trouble_is_transient_and_refusals_do_not() {
        let transient = |status| Rejection::HttpStatus.is_transient(status);
        assert!([408, 425, 429, 500, 503, 599].into_iter().all(|status| transient(Some(status))));
        assert!(![400, 401, 403, 451, 600].into_iter().any(|status| transient(Some(status))) && !transient(None));
        assert!(Rejection::Timeout.is_transient(None) && Rejection::SliceFailed.is_transient(None));
        assert!(Rejection::Unfetched.is_transient(None) && Rejection::BlockedAddress.is_transient(None));
        assert!(!Rejection::NotFound.is_transient(Some(404)) && !Rejection::ClassFull.is_transient(None));
    }

    #[test]
    fn names_are_parsed_back_and_unique() {
        for &rejection in Rejection::ALL {
            assert_eq!(rejection.name().parse::<Rejection>().expect("its own name"), rejection);
            assert_eq!(serde_json::to_string(&rejection).expect("a unit variant"), format!("{:?}", rejection.name()));
        }
    }
}
