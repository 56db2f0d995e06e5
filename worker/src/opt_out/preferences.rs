//! What a `Content-Usage` or `Content-Signal` says of learning, as a header or in `robots.txt`.

use proto::Signal;

/// Whether machines may learn from it; None: it says nothing of that. Only what says one of yes and no counts.
pub(super) fn may_learn(signal: Signal, value: &str) -> Option<bool> {
    let members = value.split(',').filter_map(|member| {
        let (name, value) = member.split_once('=')?;
        // What follows a semicolon are parameters (RFC 9651).
        let value = value.split(';').next().unwrap_or_default().trim();
        match value.trim_matches('"').to_ascii_lowercase().as_str() {
            "y" | "yes" | "?1" => Some((name.trim(), true)),
            "n" | "no" | "?0" => Some((name.trim(), false)),
            _ => None,
        }
    });
    // Of several with one name the last one counts.
    let said = |wanted: &str| members.clone().rfind(|(name, _)| name.eq_ignore_ascii_case(wanted));
    let said = |wanted| said(wanted).map(|(_, answer)| answer);
    match signal {
        Signal::ContentSignal => said("ai-train"),
        // An earlier draft had `bots`, for all that machines do, of which learning is a part.
        Signal::ContentUsage => said("train-ai").or_else(|| said("bots")),
        Signal::Robots | Signal::Tdm | Signal::XRobotsTag => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yes_and_no_are_told_and_all_else_says_nothing() {
        for (signal, value, wanted) in [
            (Signal::ContentUsage, "train-ai=n", Some(false)),
            (Signal::ContentUsage, "search=y, train-ai=n;x=1", Some(false)),
            (Signal::ContentUsage, "Train-AI = y", Some(true)),
            (Signal::ContentUsage, "bots=n", Some(false)),
            (Signal::ContentUsage, "bots=n, train-ai=y", Some(true)),
            (Signal::ContentUsage, "train-genai=n", None),
            (Signal::ContentUsage, "train-ai=maybe", None),
            (Signal::ContentUsage, "train-ai=y, train-ai=n", Some(false)),
            (Signal::ContentSignal, "search=yes,ai-train=no", Some(false)),
            (Signal::ContentSignal, "ai-train=yes", Some(true)),
            (Signal::ContentSignal, "ai-input=no", None),
            (Signal::ContentSignal, "train-ai=n", None),
            (Signal::ContentSignal, "", None),
        ] {
            assert_eq!(may_learn(signal, value), wanted, "{signal}: {value}");
        }
    }
}
