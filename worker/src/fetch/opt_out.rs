//! What owners say against the use of their pictures.

use reqwest::header::HeaderMap;

/// Directives of `X-Robots-Tag` that look like an agent's name with its directive.
const TAKES_A_VALUE: [&str; 4] = ["unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"];

/// Whether the owner asks that the picture be not used: `X-Robots-Tag` with `noai`, `noimageai`, `noindex` or
/// `noimageindex`, said to all or to Gleaner by name. `none` means `noindex, nofollow`.
pub(super) fn opted_out(headers: &HeaderMap) -> bool {
    headers.get_all("x-robots-tag").iter().any(|value| {
        let text = String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase();
        let mut meant = true;
        text.split(',').any(|part| {
            let directive = match part.split_once(':') {
                Some((key, _)) if TAKES_A_VALUE.contains(&key.trim()) => return false,
                Some((agent, directive)) => {
                    meant = agent.trim() == "gleaner" || agent.trim() == "*";
                    directive
                }
                None => part,
            };
            meant && matches!(directive.trim(), "noai" | "noimageai" | "noindex" | "noimageindex" | "none")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        values.iter().map(|value| ("x-robots-tag".parse().expect("a name"), value.parse().expect("a value"))).collect()
    }

    #[test]
    fn opt_outs_count_if_they_are_said_to_all_or_to_us() {
        for yes in [
            "noai",
            "NoImageAI",
            "noarchive, noindex",
            "gleaner: noai",
            "*: noai",
            "none",
            "unavailable_after: 2099, noai",
            "noarchive, unavailable_after: 2099, noai",
            "max-image-preview:large, noai",
        ] {
            assert!(opted_out(&headers(&[yes])), "{yes}");
        }
        for no in ["", "all", "nofollow", "otherbot: noindex, noai", "unavailable_after: noindex"] {
            assert!(!opted_out(&headers(&[no])), "{no}");
        }
        assert!(opted_out(&headers(&["otherbot: noindex", "noai"])));
    }
}
