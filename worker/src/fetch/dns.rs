//! The resolver of the worker's HTTP client. It asks name servers itself, so that a list full of dead names neither
//! keeps threads waiting nor floods anybody: answers are remembered, and so are failures; few questions are open at
//! once; each has a deadline. Only addresses that the rules permit are handed on, at every look-up anew.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

use super::net::AddressRules;

/// A look-up that takes longer, its turn included, has failed: it must not use up a URL's whole time.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(8);
/// One that has to wait longer for its turn is put off: that says nothing of the name.
const TURN_TIMEOUT: Duration = Duration::from_secs(5);
/// For one question to one name server.
const ASK_TIMEOUT: Duration = Duration::from_millis(2500);
/// Questions per name server and look-up.
const ASKS: usize = 2;
/// Look-ups at once.
const MAX_LOOKUPS: usize = 64;
/// Names of more words are not looked for in the system's search list.
const MOST_SHORT_LABELS: u8 = 3;
/// Answers that are remembered.
const CACHE: u64 = 16_384;
/// Names that failed and are remembered.
const FAILURES: usize = 65_536;
/// How long an answer is remembered: as long as it says, within these.
const SHORTEST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(3600);
/// How long it is remembered that a name does not exist, and that nobody could tell.
const NO_SUCH_NAME: Duration = Duration::from_secs(600);
const NO_ANSWER: Duration = Duration::from_secs(20);

/// No address of this host may be reached.
#[derive(Debug, thiserror::Error)]
#[error("{0} has no address that a worker may reach (--allow-net allows more)")]
pub(crate) struct Blocked(String);

/// This host has no address, and that is its name servers' word.
#[derive(Debug, thiserror::Error)]
#[error("{0} has no address")]
pub(crate) struct NoSuchName(String);

/// So many others are being looked up that this host had no turn.
#[derive(Debug, thiserror::Error)]
#[error("too many names are being looked up for {0} to have a turn")]
pub(crate) struct NoTurn(String);

/// No name server could tell in time.
#[derive(Debug, thiserror::Error)]
#[error("no name server could tell the address of {0}")]
struct NoAnswer(String);

/// A name server, `IP` or `IP:PORT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NameServer(pub SocketAddr);

impl FromStr for NameServer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53)).or_else(|_| text.parse());
        address.map(Self).map_err(|_| "an address is wanted: IP, IP:PORT or [IPV6]:PORT".to_owned())
    }
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct GuardedResolver(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    rules: AddressRules,
    resolver: TokioResolver,
    lookups: Semaphore,
    failures: Mutex<HashMap<String, (Instant, Failed)>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failed {
    NoSuchName,
    NoAnswer,
    PutOff,
}

impl GuardedResolver {
    /// `servers`: instead of those of the system's `resolv.conf`. The system's hosts file counts in any case; on a
    /// machine without name servers (a laptop without a network, say) nothing else does.
    ///
    /// # Errors
    /// If the resolver cannot be set up.
    pub(crate) fn new(rules: AddressRules, servers: &[NameServer]) -> anyhow::Result<Self> {
        let (config, options) = if servers.is_empty() {
            hickory_resolver::system_conf::read_system_conf().unwrap_or_else(|error| {
                tracing::warn!(%error, "no name servers in the system's configuration; --dns names others");
                (ResolverConfig::from_name_servers(Vec::new()), ResolverOpts::default())
            })
        } else {
            let servers = servers.iter().map(|NameServer(address)| {
                let mut connections = vec![ConnectionConfig::udp(), ConnectionConfig::tcp()];
                connections.iter_mut().for_each(|connection| connection.port = address.port());
                NameServerConfig::new(address.ip(), true, connections)
            });
            (ResolverConfig::from_name_servers(servers.collect()), ResolverOpts::default())
        };
        Self::with(rules, config, options)
    }

    fn with(rules: AddressRules, config: ResolverConfig, mut options: ResolverOpts) -> anyhow::Result<Self> {
        options.timeout = ASK_TIMEOUT;
        options.attempts = ASKS;
        // One server after the other, the best first.
        options.num_concurrent_reqs = 1;
        options.max_active_requests = MAX_LOOKUPS * 4;
        // If both fail it is the first one's failure that is told: most hosts have no IPv6 address anyway.
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        options.cache_size = CACHE;
        options.positive_min_ttl = Some(SHORTEST);
        options.positive_max_ttl = Some(LONGEST);
        let resolver = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            .with_options(options)
            .build()
            .context("failed to set up the resolver")?;
        let (lookups, failures) = (Semaphore::new(MAX_LOOKUPS), Mutex::default());
        Ok(Self(Arc::new(Inner { rules, resolver, lookups, failures })))
    }
}

impl GuardedResolver {
    /// Forgets all that name servers have said: it may have been wrong.
    pub(crate) fn forget(&self) {
        self.0.resolver.clear_cache();
        self.0.failures.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Inner {
    /// All addresses of a host.
    async fn lookup(&self, host: &str) -> Result<Vec<IpAddr>, Failed> {
        // Byte for byte as the URL has it, whose international names are encoded already: people's names have
        // underscores in them and hyphens at their ends, which no standard for names of hosts allows.
        let labels = host.strip_suffix('.').unwrap_or(host).split('.').map(str::as_bytes);
        let Ok(mut name) = hickory_resolver::proto::rr::Name::from_labels(labels) else {
            return Err(Failed::NoSuchName);
        };
        // A name of one word may be one of the local network, for which the system's search list is. All others are
        // whole: to try each with every suffix of a cluster's search list would make several questions of one. Only
        // where private nets are allowed a short name may be one of theirs: `web.pictures`, of a cluster's service.
        // Which is tried first, the name as it is or the list, says the system's `ndots`: in a cluster the list, where
        // a name server that cannot ask the world would fail over the other.
        let labels = name.num_labels();
        let short = labels == 1 || labels <= MOST_SHORT_LABELS && !self.rules.allowed.is_empty();
        name.set_fqdn(!short);
        if let Some(failed) = self.remembered(host) {
            return Err(failed);
        }
        let deadline = Instant::now() + LOOKUP_TIMEOUT;
        let Ok(_turn) = timeout(TURN_TIMEOUT, self.lookups.acquire()).await else {
            return Err(Failed::PutOff);
        };
        let begun = Instant::now();
        let failed = match timeout_at(deadline, self.resolver.lookup_ip(name)).await {
            Ok(Ok(found)) => {
                let found: Vec<IpAddr> = found.iter().collect();
                if !found.is_empty() {
                    return Ok(found);
                }
                Failed::NoSuchName
            }
            Ok(Err(error)) if is_their_word(&error) => Failed::NoSuchName,
            // The name had no time for a second question, for it had waited.
            Err(_) if deadline - begun < ASK_TIMEOUT * ASKS as u32 => return Err(Failed::PutOff),
            Ok(Err(_)) | Err(_) => Failed::NoAnswer,
        };
        self.remember(host, failed);
        Err(failed)
    }

    fn remembered(&self, host: &str) -> Option<Failed> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.get(host).filter(|(until, _)| Instant::now() < *until).map(|(_, failed)| *failed)
    }

    fn remember(&self, host: &str, failed: Failed) {
        let now = Instant::now();
        let until = now + if failed == Failed::NoSuchName { NO_SUCH_NAME } else { NO_ANSWER };
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.len() >= FAILURES {
            failures.retain(|_, (until, _)| now < *until);
        }
        if failures.len() < FAILURES {
            failures.insert(host.to_owned(), (until, failed));
        }
    }
}

/// Whether it is an answer that there is no such name or no address of it, and not a lack of answers.
fn is_their_word(error: &NetError) -> bool {
    use hickory_resolver::net::{DnsError, NoRecords};
    use hickory_resolver::proto::op::ResponseCode::{NXDomain, NoError};
    matches!(error, NetError::Dns(DnsError::NoRecordsFound(NoRecords { response_code: NXDomain | NoError, .. })))
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let inner = Arc::clone(&self.0);
        Box::pin(async move {
            let host = name.as_str();
            let found = inner.lookup(host).await.map_err(|failed| -> Box<dyn std::error::Error + Send + Sync> {
                match failed {
                    Failed::NoSuchName => NoSuchName(host.to_owned()).into(),
                    Failed::NoAnswer => NoAnswer(host.to_owned()).into(),
                    Failed::PutOff => NoTurn(host.to_owned()).into(),
                }
            })?;
            // reqwest puts the URL's port in the place of 0.
            let permitted = found.into_iter().filter(|ip| inner.rules.permits(*ip)).map(|ip| SocketAddr::new(ip, 0));
            let permitted: Vec<SocketAddr> = permitted.collect();
            if permitted.is_empty() {
                return Err(Blocked(host.to_owned()).into());
            }
            Ok(Box::new(permitted.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests;
