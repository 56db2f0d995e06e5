//! `make bench-fetch`: Gleaner and img2dataset fetch the same lists from the same origin, in turn, in one run.
//!
//! The origin is a part of this process; what is measured are other processes: a worker (and beside it its
//! coordinator), and img2dataset with all its processes. Three lists: good photos over HTTP, good photos over HTTPS,
//! and a rotted list. Both sides store WebDataset tars of 256 x 256 pixels at quality 95, centre crop, with the same
//! connections and timeouts. The floor is what one thread of this process needs to decode, resize and encode the same
//! photos and to do nothing else.
//!
//! A fourth list is of one site that answers 429 above two requests a second, and of which neither side is told
//! anything: four workers of ours, and as many threads of img2dataset's as they have connections. What counts there is
//! how much is kept, and how many answers were 429.
//!
//! Figures are medians over the rounds. CPU time is user and system time; the rival's is counted from its first request
//! on, so that its start does not hide in the figures of a short list (the table has it with its start as well).

#![allow(clippy::print_stdout, reason = "the figures are the output")]

mod floor;
mod gleaner;
mod rival;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use clap::Parser;
use demo_origin::list::{self, Entry};
use demo_origin::origin::{Options, Origin};
use demo_origin::pictures::{self, CLASSES};
use demo_origin::rot::Rot;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;

/// For one side and one list.
const DEADLINE: Duration = Duration::from_secs(900);
/// Pictures that are drawn if there are no photos.
const DRAWN: u64 = 200;
/// Requests a second above which the site of the fourth list answers 429.
const BEARS: f64 = 2.0;

#[derive(Debug, Parser)]
struct Args {
    /// A tar of JPEGs to serve; without it the demo's pictures are
    #[arg(long, env = "PHOTOS", value_parser = path_or_none)]
    photos: Option<PathBuf>,
    /// The Python that has img2dataset; without it Gleaner is measured alone
    #[arg(long)]
    rival: Option<PathBuf>,
    /// Times that everything is measured
    #[arg(long, env = "ROUNDS", default_value_t = 2)]
    rounds: usize,
    /// Divides the lengths of the lists
    #[arg(long, default_value_t = 1)]
    shorter: usize,
    /// Lists to fetch
    #[arg(long, value_delimiter = ',', default_values = ["http", "https", "rotted", "throttled"])]
    lists: Vec<String>,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

fn path_or_none(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("it is empty".to_owned()) } else { Ok(text.into()) }
}

/// One list and how it is fetched.
pub(crate) struct Job {
    pub(crate) name: &'static str,
    pub(crate) entries: Vec<Entry>,
    pub(crate) origin: Origin,
    /// In flight at once, of all workers together.
    pub(crate) connections: usize,
    pub(crate) workers: usize,
    /// Of a site's budget, by which our workers are not held up; none: they find out what it bears.
    pub(crate) budget: Option<&'static str>,
    pub(crate) shard_urls: usize,
    /// The authority behind the origin's certificate, if it has one.
    pub(crate) authority: Option<PathBuf>,
}

/// For one URL, on both sides.
pub(crate) const TIMEOUT_SECONDS: u32 = 10;

/// What one side made of one list.
#[derive(Debug, Default, Clone)]
pub(crate) struct Measured {
    pub(crate) kept: f64,
    pub(crate) poison: f64,
    /// Seconds per 1000 kept images.
    pub(crate) cpu: f64,
    /// Likewise; with the coordinator (ours), with the start (theirs).
    pub(crate) cpu_all: f64,
    pub(crate) images_per_second: f64,
    pub(crate) peak_mb: f64,
    /// From the start of the process to the first request.
    pub(crate) first_request: f64,
    /// From the start of the process until the first image was there; not known of the rival.
    pub(crate) first_image: f64,
    /// From the first request on.
    pub(crate) seconds: f64,
    /// What the origin was asked, and how much of that was too much for it.
    pub(crate) requests: f64,
    pub(crate) throttled: f64,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    rustls::crypto::ring::default_provider().install_default().expect("the first one");
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let photos = photos(args.photos.as_deref())?;
    let bytes: usize = photos.iter().map(Bytes::len).sum();
    println!("{} photos of {} kB on average", photos.len(), bytes / photos.len() / 1000);

    let mut jobs = Vec::new();
    for name in &args.lists {
        jobs.push(job(name, args.shorter.max(1), &photos, folder.path()).await?);
    }
    let (mut ours, mut theirs) = (vec![Vec::new(); jobs.len()], vec![Vec::new(); jobs.len()]);
    let (mut floor, mut floors) = (floor::Floor::new(&photos)?, vec![Vec::new(); jobs.len()]);
    for round in 1..=args.rounds.max(1) {
        for (i, job) in jobs.iter().enumerate() {
            floors[i].push(floor.seconds_per_1000()?);
            let before = job.asked();
            let fetched = gleaner::fetch(job, folder.path()).with_context(|| format!("Gleaner, {}", job.name))?;
            ours[i].push(fetched.asked(before, job.asked()));
            // A machine's speed changes within a minute, as its clock and its neighbours do.
            floors[i].push(floor.seconds_per_1000()?);
            if let Some(python) = &args.rival {
                let before = job.asked();
                let fetched = rival::fetch(job, python, folder.path()).await;
                let fetched = fetched.with_context(|| format!("img2dataset, {}", job.name))?;
                theirs[i].push(fetched.asked(before, job.asked()));
            }
            println!("round {round}, {}: measured", job.name);
        }
    }
    let mut last_lines = Vec::new();
    for (i, job) in jobs.iter().enumerate() {
        let floor = median(floors[i].iter().copied());
        let (ours, theirs) = (summary(&ours[i]), summary(&theirs[i]));
        last_lines.push(match job.budget {
            Some(_) => report(job, floor, &ours, &theirs),
            None => report_throttled(job, &ours, &theirs),
        });
    }
    println!();
    last_lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// Prints one list's table; returns its last line.
fn report(job: &Job, floor: f64, ours: &Measured, theirs: &Measured) -> String {
    let good = job.entries.iter().filter(|entry| entry.counts).count();
    println!("\n{}: {} URLs, {good} good pictures, {} connections", job.name, job.entries.len(), job.connections);
    println!("{:38} {:>10} {:>12} {:>8}", "", "gleaner", "img2dataset", "ratio");
    let line = |what: &str, ours: f64, theirs: f64, digits: usize| {
        println!("{what:38} {ours:10.digits$} {theirs:12.digits$} {:8.2}", theirs / ours);
    };
    line("kept", ours.kept, theirs.kept, 0);
    line("poison among them", ours.poison, theirs.poison, 0);
    line("CPU s per 1000 kept", ours.cpu, theirs.cpu, 2);
    line("  with coordinator | with start", ours.cpu_all, theirs.cpu_all, 2);
    line("  of the codec floor", ours.cpu / floor, theirs.cpu / floor, 2);
    line("images/s", ours.images_per_second, theirs.images_per_second, 0);
    line("peak memory, MB", ours.peak_mb, theirs.peak_mb, 0);
    line("s from start to the first request", ours.first_request, theirs.first_request, 2);
    println!("{:38} {:10.2}", "s from start to the first image", ours.first_image);
    format!(
        "bench-fetch {}: cpu_s_per_1000={:.2} rival={:.2} floor={floor:.2} rss_mb={:.0} rival_rss_mb={:.0} images_per_s={:.0}",
        job.name, ours.cpu, theirs.cpu, ours.peak_mb, theirs.peak_mb, ours.images_per_second
    )
}

/// The same of a list whose origin bears little.
fn report_throttled(job: &Job, ours: &Measured, theirs: &Measured) -> String {
    let percent = |of: &Measured| 100.0 * of.throttled / of.requests;
    format!(
        "bench-fetch {}: urls={} kept={:.0} rival_kept={:.0} requests={:.0} rival_requests={:.0} percent_429={:.1} \
         rival_percent_429={:.1} seconds={:.0} rival_seconds={:.0} workers={}",
        job.name,
        job.entries.len(),
        ours.kept,
        theirs.kept,
        ours.requests,
        theirs.requests,
        percent(ours),
        percent(theirs),
        ours.seconds,
        theirs.seconds,
        job.workers
    )
}

/// Figure by figure, the median.
fn summary(rounds: &[Measured]) -> Measured {
    let of = |figure: fn(&Measured) -> f64| median(rounds.iter().map(figure));
    Measured {
        kept: of(|m| m.kept),
        poison: of(|m| m.poison),
        cpu: of(|m| m.cpu),
        cpu_all: of(|m| m.cpu_all),
        images_per_second: of(|m| m.images_per_second),
        peak_mb: of(|m| m.peak_mb),
        first_request: of(|m| m.first_request),
        first_image: of(|m| m.first_image),
        seconds: of(|m| m.seconds),
        requests: of(|m| m.requests),
        throttled: of(|m| m.throttled),
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}

/// The files of a tar, or drawings.
fn photos(tar: Option<&Path>) -> Result<Vec<Bytes>> {
    let Some(path) = tar else {
        let classes = CLASSES.len() as u64;
        return Ok((0..DRAWN).map(|n| pictures::picture(1, (n % classes) as usize, n / classes).into()).collect());
    };
    let context = || format!("PHOTOS: {}", path.display());
    let mut archive = tar::Archive::new(std::fs::File::open(path).with_context(context)?);
    let mut photos = Vec::new();
    for entry in archive.entries().with_context(context)? {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry.with_context(context)?, &mut bytes).with_context(context)?;
        if bytes.starts_with(&[0xff, 0xd8]) {
            photos.push(bytes.into());
        }
    }
    ensure!(!photos.is_empty(), "{}: no JPEGs in it", context());
    Ok(photos)
}

/// The list called `name`, with an origin of its own.
async fn job(name: &str, shorter: usize, photos: &[Bytes], folder: &Path) -> Result<Job> {
    let photos = photos.to_vec();
    let mut options = Options { seed: 1, photos, ..Options::default() };
    let (name, urls, connections, authority) = match name {
        "http" => ("http", 4_000, 64, None),
        "https" => {
            let (tls, authority) = certificates(folder, options.hosts)?;
            options.tls = Some(tls);
            ("https", 2_000, 64, Some(authority))
        }
        "rotted" => ("rotted", 6_000, 256, None),
        "throttled" => {
            (options.hosts, options.bears) = (1, BEARS);
            ("throttled", 150, 64, None)
        }
        other => anyhow::bail!("--lists {other}: http, https, rotted and throttled are there"),
    };
    let (workers, budget) = if options.bears > 0.0 { (4, None) } else { (1, Some("256")) };
    let urls = urls / shorter;
    let origin = Origin::start_with(options).await?;
    let entries = match name {
        "rotted" => list::rotted(1, urls / CLASSES.len(), &origin),
        _ => (0..urls).map(|n| good(n, &origin)).collect(),
    };
    Ok(Job { name, entries, origin, connections, workers, budget, shard_urls: urls.div_ceil(8), authority })
}

fn good(n: usize, origin: &Origin) -> Entry {
    let class = n % CLASSES.len();
    let picture = (class, n as u64);
    let url = list::url(Rot::Good, picture, n as u64, origin);
    Entry { synset: CLASSES[class].synset, url, rot: Rot::Good, picture, counts: true }
}

/// A certificate for the origin's hosts, and the file of the authority that signed it.
fn certificates(folder: &Path, hosts: usize) -> Result<(Arc<ServerConfig>, PathBuf)> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // Two certificates of one name look like one that has signed itself.
    params.distinguished_name.push(DnType::CommonName, "Gleaner's bench");
    let key = KeyPair::generate()?;
    let authority = params.self_signed(&key)?;
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate()?;
    let names: Vec<String> = (1..=hosts).map(|n| format!("127.0.0.{n}")).collect();
    let certificate = CertificateParams::new(names)?.signed_by(&key, &issuer)?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate.into()], key)?;

    let file = folder.join("authority.pem");
    std::fs::write(&file, authority.pem())?;
    Ok((Arc::new(config), file))
}

/// Seconds between two points, or NaN if the second is not known.
pub(crate) fn seconds(from: Instant, to: Option<Instant>) -> f64 {
    to.map_or(f64::NAN, |to| to.duration_since(from).as_secs_f64())
}

impl Measured {
    /// With what the origin has counted before and after.
    fn asked(self, before: (usize, usize), after: (usize, usize)) -> Self {
        let (requests, throttled) = ((after.0 - before.0) as f64, (after.1 - before.1) as f64);
        Self { requests, throttled, ..self }
    }
}

impl Job {
    /// Requests so far, and those that were answered 429.
    fn asked(&self) -> (usize, usize) {
        let counts = self.origin.hosts().iter().map(|host| self.origin.host(host));
        counts.fold((0, 0), |(all, throttled), count| (all + count.arrivals.len(), throttled + count.throttled))
    }

    /// When the first request of a side that began at `start` arrived.
    pub(crate) fn first_request(&self, start: Instant) -> Option<Instant> {
        let hosts = self.origin.hosts().iter();
        hosts.filter_map(|host| self.origin.host(host).arrivals.into_iter().find(|&at| at > start)).min()
    }

    /// How many of `kept`, by URL, are not what they should be.
    pub(crate) fn poison<'a>(&self, kept: impl Iterator<Item = &'a str>) -> Result<usize> {
        let rots: std::collections::HashMap<&str, Rot> =
            self.entries.iter().map(|entry| (entry.url.as_str(), entry.rot)).collect();
        let mut poison = 0;
        for url in kept {
            let rot = rots.get(url).with_context(|| format!("{url} is kept, but not in the list"))?;
            poison += usize::from(rot.is_poison());
        }
        Ok(poison)
    }
}
