//! Sites: what has a budget. Many names lead to the servers of one owner, who counts the requests to all of them.
//!
//! A site is the registrable domain by the ICANN section of the public suffix list (`img.example.co.uk` is of
//! `example.co.uk`), or a group of names that a [profile](PROFILES) or the operator names. Under a suffix that is
//! private (`blogspot.com`) many owners share one site: each one's name is a *bucket* within it. An IP literal or a
//! name of one label is a site by itself, with its port.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::LazyLock;

use serde::Deserialize;
use url::Url;

use crate::pb;

/// The profiles that Gleaner is shipped with, as TOML.
pub const PROFILES: &str = include_str!("sites.toml");

/// A site's first rate, in requests per second, until it is known what it bears.
pub const FIRST_RATE: f64 = 2.0;

/// What the whole cluster may ask of one site.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// Requests at once.
    pub slots: u32,
    /// Requests per second; 0: no limit.
    pub rate: f64,
    /// Whether it is known that the site bears this rate. If not, the rate is learned, from [`FIRST_RATE`] on.
    pub borne: bool,
}

impl Default for Budget {
    fn default() -> Self {
        Self { slots: 16, rate: 100.0, borne: false }
    }
}

/// A budget that somebody gave: for these names and all names under them together.
#[derive(Debug, Clone, PartialEq)]
pub struct Named {
    /// The first one is the site's.
    pub names: Vec<String>,
    /// Its budget.
    pub budget: Budget,
}

impl FromStr for Named {
    type Err = String;

    /// `flickr.com=4` or `flickr.com=4/20` (slots, requests per second), as an operator writes it: the site bears it.
    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || "SITE=SLOTS or SITE=SLOTS/RATE is wanted, such as flickr.com=4/20".to_owned();
        let (site, budget) = text.split_once('=').filter(|(site, _)| !site.is_empty()).ok_or_else(wanted)?;
        let (slots, rate) = budget.split_once('/').unwrap_or((budget, "0"));
        let slots = slots.parse().ok().filter(|slots| (1..=65536).contains(slots)).ok_or_else(wanted)?;
        let rate = rate.parse().ok().filter(|rate| (0.0..=1e6).contains(rate)).ok_or_else(wanted)?;
        Ok(Self { names: vec![site.to_ascii_lowercase()], budget: Budget { slots, rate, borne: true } })
    }
}

/// Where a host belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place<'a> {
    /// Its site.
    pub site: &'a str,
    /// Under a private suffix, the name that one owner has.
    pub bucket: Option<&'a str>,
}

/// All that is known of sites.
#[derive(Debug, Clone, PartialEq)]
pub struct Sites {
    default: Budget,
    named: Vec<Named>,
    /// Which of `named` a name is of; a later one counts more than an earlier one.
    by_name: HashMap<String, usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Profiles {
    site: Vec<Profile>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    names: Vec<String>,
    slots: u32,
    rate: f64,
}

/// What [`PROFILES`] says.
pub fn profiles() -> &'static [Named] {
    static PARSED: LazyLock<Vec<Named>> = LazyLock::new(|| {
        let profiles: Profiles = toml::from_str(PROFILES).expect("a test reads the file");
        let named = |Profile { names, slots, rate }| Named { names, budget: Budget { slots, rate, borne: false } };
        profiles.site.into_iter().map(named).collect()
    });
    &PARSED
}

impl Default for Sites {
    /// What is known without an operator's word.
    fn default() -> Self {
        Self::new(Budget::default(), profiles().iter().cloned())
    }
}

impl Sites {
    /// `default` is for sites that `named` does not name. Of two that name the same, the later one counts.
    pub fn new(default: Budget, named: impl IntoIterator<Item = Named>) -> Self {
        let named: Vec<Named> = named.into_iter().filter(|named| !named.names.is_empty()).collect();
        let names =
            |(n, named): (usize, &Named)| named.names.iter().map(move |name| (name.clone(), n)).collect::<Vec<_>>();
        let by_name = named.iter().enumerate().flat_map(names).collect();
        Self { default, named, by_name }
    }

    /// Of a site that has none of its own.
    pub fn default_budget(&self) -> Budget {
        self.default
    }

    /// Those that were given.
    pub fn named(&self) -> &[Named] {
        &self.named
    }

    /// A site's budget.
    pub fn budget(&self, site: &str) -> Budget {
        let named = self.by_name.get(site).map(|&n| self.named[n].budget);
        named.unwrap_or(Budget { borne: self.default.borne || is_own(site), ..self.default })
    }

    /// The site and bucket of a host, in lower case and with its port if that is neither 80 nor 443, as in
    /// `a.example.com:8080`.
    pub fn place<'a>(&'a self, host: &'a str) -> Place<'a> {
        if let Some(&n) = self.by_name.get(host) {
            return Place { site: &self.named[n].names[0], bucket: None };
        }
        let name = without_port(host);
        let alone = !name.contains('.') || address(name).is_some();
        let mut above = Some(name);
        while let Some(suffix) = above.filter(|_| !self.by_name.is_empty()) {
            if let Some(&n) = self.by_name.get(suffix) {
                let bucket = if alone { None } else { bucket(name).filter(|bucket| bucket.len() > suffix.len()) };
                return Place { site: &self.named[n].names[0], bucket };
            }
            above = suffix.split_once('.').map(|(_, above)| above).filter(|_| !alone);
        }
        match alone {
            true => Place { site: host, bucket: None },
            false => Place { site: registrable(name), bucket: bucket(name) },
        }
    }

    /// The site of a URL; None if it can lead nowhere.
    pub fn of_url(&self, url: &str) -> Option<String> {
        host_of(url).map(|host| self.place(&host).site.to_owned())
    }
}

impl From<&Sites> for pb::SiteBudgets {
    fn from(sites: &Sites) -> Self {
        let budget = |names: &[String], budget: Budget| pb::SiteBudget {
            names: names.to_vec(),
            slots: budget.slots,
            requests_per_second: budget.rate,
            borne: budget.borne,
        };
        let named = sites.named.iter().map(|named| budget(&named.names, named.budget)).collect();
        Self { other: Some(budget(&[], sites.default)), named }
    }
}

impl From<pb::SiteBudgets> for Sites {
    fn from(budgets: pb::SiteBudgets) -> Self {
        let budget = |budget: &pb::SiteBudget| Budget {
            slots: budget.slots.max(1),
            rate: budget.requests_per_second,
            borne: budget.borne,
        };
        let named = |named: pb::SiteBudget| Named { budget: budget(&named), names: named.names };
        let other = budgets.other.as_ref().map_or(Budget::default(), budget);
        Self::new(other, budgets.named.into_iter().map(named))
    }
}

/// The host of a parsed URL as budgets name it: without a dot at its end, and with its port if that is neither 80 nor
/// 443.
pub fn host_of_url(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let host = host.strip_suffix('.').unwrap_or(host);
    match url.port() {
        Some(port) if port != 80 && port != 443 => format!("{host}:{port}"),
        _ => host.to_owned(),
    }
}

/// The same of any text, without reading more of it than needed if its host is written plainly; None if it is no HTTP
/// URL.
pub fn host_of(url: &str) -> Option<Cow<'_, str>> {
    if let Some(plain) = plain_host(url) {
        return Some(Cow::Borrowed(plain));
    }
    let url = Url::parse(url).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())?;
    Some(Cow::Owned(host_of_url(&url)))
}

/// A host that no standard would read otherwise than as it stands there.
fn plain_host(url: &str) -> Option<&str> {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"))?;
    let host = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
    let plain = host.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-'));
    let top = host.rsplit('.').next()?;
    let sure = plain && top.as_bytes().first()?.is_ascii_lowercase() && !host.starts_with('.');
    // Encoded names are checked when a URL is parsed.
    (sure && !host.contains("xn--") && !host.contains("..")).then_some(host)
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    }
}

fn address(name: &str) -> Option<IpAddr> {
    let digits = name.starts_with('[') || name.rsplit('.').next()?.bytes().all(|b| b.is_ascii_digit());
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    digits.then(|| bare.parse().ok()).flatten()
}

/// Whether a site is a machine of one's own: in a net that leads to no web, or under a name without a domain.
fn is_own(site: &str) -> bool {
    let name = without_port(site);
    match address(name) {
        Some(IpAddr::V4(v4)) => v4.is_loopback() || v4.is_private() || v4.is_link_local(),
        Some(IpAddr::V6(v6)) => v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local(),
        None => !name.contains('.'),
    }
}

/// One label more than the longest suffix of the ICANN section; the name itself if it is such a suffix.
fn registrable(name: &str) -> &str {
    let mut part = name;
    loop {
        let Some(suffix) = psl::suffix(part.as_bytes()) else { return name };
        let suffix_length = suffix.as_bytes().len();
        if suffix.typ() == Some(psl::Type::Private) {
            // What the list says of the names above a private suffix is of the ICANN section.
            let Some((_, above)) = part[part.len() - suffix_length..].split_once('.') else { return name };
            part = above;
            continue;
        }
        let Some(before) = (name.len() - suffix_length).checked_sub(1) else { return name };
        return &name[name[..before].rfind('.').map_or(0, |dot| dot + 1)..];
    }
}

/// Under a private suffix, the name of one owner.
fn bucket(name: &str) -> Option<&str> {
    let domain = psl::domain(name.as_bytes())?;
    let private = domain.suffix().typ() == Some(psl::Type::Private);
    private.then(|| &name[name.len() - domain.as_bytes().len()..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEFAULT: Budget = Budget { slots: 16, rate: 100.0, borne: false };

    #[test]
    fn what_is_known_of_sites_goes_to_workers_as_it_is() {
        let sites = sites(&["named.test=2/10"]);
        assert_eq!(Sites::from(pb::SiteBudgets::from(&sites)), sites);
    }

    fn sites(named: &[&str]) -> Sites {
        let named = named.iter().map(|text| text.parse::<Named>().expect("well written"));
        Sites::new(DEFAULT, profiles().iter().cloned().chain(named))
    }

    #[test]
    fn a_site_is_the_registrable_domain_and_owners_under_a_private_suffix_are_its_buckets() {
        let sites = sites(&[]);
        for (host, site, bucket) in [
            ("example.com", "example.com", None),
            ("a.b.example.com:8080", "example.com", None),
            ("img.example.co.uk", "example.co.uk", None),
            ("co.uk", "co.uk", None),
            ("a.b.c.kawasaki.jp", "b.c.kawasaki.jp", None),
            ("x.city.kawasaki.jp", "city.kawasaki.jp", None),
            ("birds.blogspot.com", "blogspot.com", Some("birds.blogspot.com")),
            ("www.birds.blogspot.com", "blogspot.com", Some("birds.blogspot.com")),
            ("blogspot.com", "blogspot.com", None),
            ("birds.github.io", "github.io", Some("birds.github.io")),
            ("b.s3.dualstack.us-east-1.amazonaws.com", "amazonaws.com", Some("b.s3.dualstack.us-east-1.amazonaws.com")),
            ("farm1.static.flickr.com", "flickr.com", None),
            ("live.staticflickr.com", "flickr.com", None),
            ("notflickr.com", "notflickr.com", None),
            ("a.named.test", "named.test", None),
            ("10.1.2.3", "10.1.2.3", None),
            ("10.1.2.3:8080", "10.1.2.3:8080", None),
            ("[::1]:8080", "[::1]:8080", None),
            ("origin:8080", "origin:8080", None),
            ("localhost", "localhost", None),
        ] {
            assert_eq!(sites.place(host), Place { site, bucket }, "{host}");
        }
    }

    #[test]
    fn a_budget_that_the_operator_names_counts_for_all_names_under_it_together() {
        let sites = sites(&["Named.Test=2/10", "img.example.com=3", "10.1.2.3=5", "origin:81=7", "flickr.com=9/90"]);
        for (host, site, slots) in [
            ("a.named.test", "named.test", 2),
            ("named.test:8080", "named.test", 2),
            ("img.example.com", "img.example.com", 3),
            ("a.img.example.com", "img.example.com", 3),
            ("example.com", "example.com", 16),
            ("10.1.2.3:8080", "10.1.2.3", 5),
            ("2.3", "2.3", 16),
            ("origin:81", "origin:81", 7),
            ("origin:82", "origin:82", 16),
            ("www.flickr.com", "flickr.com", 9),
        ] {
            assert_eq!(sites.place(host).site, site, "{host}");
            assert_eq!(sites.budget(site).slots, slots, "{host}");
        }
        for bad in ["a", "a=", "=1", "a=0", "a=1/x", "a=1/-1", "a=65537"] {
            assert!(bad.parse::<Named>().is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_are_learned_where_neither_the_operator_nor_the_network_says_that_they_are_borne() {
        let sites = sites(&["named.test=2/10"]);
        let borne = |site| sites.budget(site).borne;
        assert!(["named.test", "127.0.0.1:80", "[::1]:80", "192.168.0.1", "origin:8080"].into_iter().all(borne));
        assert!(!["example.com", "flickr.com", "8.8.8.8", "[2001:db8::1]"].into_iter().any(borne));
        let unborne = Sites::new(Budget { borne: true, ..DEFAULT }, []);
        assert!(unborne.budget("example.com").borne);
    }

    #[test]
    fn names_in_any_script_are_hosts_as_dns_writes_them() {
        for (name, host) in [
            ("bücher.example", "xn--bcher-kva.example"),
            ("BÜCHER.example", "xn--bcher-kva.example"),
            ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
            ("ελληνικά.example", "xn--hxargifdar.example"),
            ("faß.example", "xn--fa-hia.example"),
        ] {
            assert_eq!(host_of(&format!("http://{name}/1.jpg")).as_deref(), Some(host), "{name}");
        }
        assert_eq!(host_of("http://xn--zzzzzz-99999/1.jpg"), None, "no name is encoded so");
    }

    #[test]
    fn the_profiles_name_each_site_once_in_lower_case() {
        let names: Vec<&String> = profiles().iter().flat_map(|named| &named.names).collect();
        let mut once = names.clone();
        once.sort();
        once.dedup();
        assert!(once.len() == names.len() && names.iter().all(|name| **name == name.to_ascii_lowercase()));
        assert!(profiles().iter().all(|named| named.budget.slots > 0 && named.budget.rate > 0.0));
    }

    proptest! {
        #[test]
        fn a_host_that_is_read_plainly_is_the_one_that_a_parser_finds(
            text in r"https?:[/\\]{1,3}([a-zA-Z0-9@:.\[\]%_-]|xn--|é){0,14}(:[0-9]{0,3})?[/?#\\]?[a-z]{0,3}",
        ) {
            if let Some(plain) = plain_host(&text) {
                prop_assert_eq!(Url::parse(&text).ok().map(|url| host_of_url(&url)), Some(plain.to_owned()));
            }
        }

        #[test]
        fn every_host_has_a_site_that_it_ends_with(host in r"([a-z0-9-]{1,4}\.){0,3}(com|co\.uk|blogspot\.com|zz|9)(:[0-9]{1,4})?") {
            let sites = Sites::new(DEFAULT, []);
            let place = sites.place(&host);
            prop_assert!(without_port(&host).ends_with(place.site) || place.site == host);
            prop_assert!(place.bucket.is_none_or(|bucket| bucket.ends_with(place.site) && bucket.len() > place.site.len()));
            // A site is a site of itself.
            prop_assert_eq!(sites.place(place.site).site, place.site);
        }
    }
}
