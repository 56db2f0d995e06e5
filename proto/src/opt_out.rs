//! What owners may say against the use of their pictures.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::pb::OptOut;

/// A way in which an owner says that machines must not take a picture, or must not learn from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Signal {
    /// `robots.txt` (RFC 9309).
    Robots,
    /// The header `X-Robots-Tag` with `noai`, `noimageai`, `noindex`, `noimageindex` or `none`.
    XRobotsTag,
    /// The TDM Reservation Protocol: `/.well-known/tdmrep.json`, or the header `tdm-reservation`.
    Tdm,
    /// `Content-Usage` with `train-ai=n` (IETF's AI preferences), as a header or in `robots.txt`.
    ContentUsage,
    /// `Content-Signal` with `ai-train=no` (contentsignals.org), as a header or in `robots.txt`.
    ContentSignal,
}

impl Signal {
    /// All of them, in the order in which they are looked for.
    pub const ALL: [Self; 5] = [Self::Robots, Self::Tdm, Self::ContentUsage, Self::ContentSignal, Self::XRobotsTag];

    /// The stable name: in specs, on the command line, and in the column `detail` of outcomes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Robots => "robots",
            Self::XRobotsTag => "x-robots-tag",
            Self::Tdm => "tdm",
            Self::ContentUsage => "content-usage",
            Self::ContentSignal => "content-signal",
        }
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<Signal> for OptOut {
    fn from(signal: Signal) -> Self {
        match signal {
            Signal::Robots => Self::Robots,
            Signal::XRobotsTag => Self::XRobotsTag,
            Signal::Tdm => Self::Tdm,
            Signal::ContentUsage => Self::ContentUsage,
            Signal::ContentSignal => Self::ContentSignal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_specs() {
        for signal in Signal::ALL {
            assert_eq!(serde_json::to_string(&signal).expect("a unit variant"), format!("{:?}", signal.name()));
        }
    }
}
