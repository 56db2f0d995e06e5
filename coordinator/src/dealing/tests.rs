use super::*;
use proptest::prelude::*;
use std::collections::HashSet;

const DEFAULT: Budget = Budget { slots: 16, rate: 100.0, borne: false };

/// All slices with their lines, and the large sites, for `urls[i]` URLs at the `i`-th site.
fn dealt(urls: &[u32], slice_urls: u32, named: &[&str]) -> (Vec<Vec<String>>, Vec<Large>) {
    let named = named.iter().map(|text| text.parse().expect("well written"));
    let sites = Sites::new(DEFAULT, named);
    let mut spool = Spool::new(None);
    let most = urls.iter().max().copied().unwrap_or(0);
    let each =
        (0..most).flat_map(|url| (0..urls.len()).filter(move |&site| url < urls[site]).map(move |site| (site, url)));
    for (key, (site, url)) in each.enumerate() {
        let (url, site) = (format!("http://h{url}.s{site}.com/"), format!("s{site}.com"));
        let (synset, hash) = (format!("n{}", key % 7), XxHash64::oneshot(3, url.as_bytes()));
        let (most, site) = (most_of_site(sites.budget(&site), slice_urls), site_hash(1, &site));
        let entry = Entry { site, most, hash, key: key as u64, synset: synset.as_bytes(), tail: url.as_bytes() };
        entry.spool(&mut spool).expect("in memory");
    }
    let mut slices = Vec::new();
    let large = deal(spool, None, 1, slice_urls, &sites, &mut |number, mut hand: Hand| {
        let text = |bytes| std::str::from_utf8(bytes).expect("own output");
        let line = |(key, synset, url)| format!("{key}\t{}\t{}", text(synset), text(url));
        slices.push((number, hand.shuffled().map(line).collect::<Vec<_>>()));
        io::Result::Ok(())
    });
    slices.sort();
    let numbers: Vec<u32> = slices.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, (0..slices.len() as u32).collect::<Vec<_>>());
    (slices.into_iter().map(|(_, lines)| lines).collect(), large.expect("in memory"))
}

fn site(line: &str) -> &str {
    line.rsplit_once("/").expect("a URL").0.split_once('.').expect("a host").1
}

#[test]
fn a_large_site_has_slices_of_its_own_and_of_all_classes_and_a_slow_one_is_large_sooner() {
    let (slices, large) = dealt(&[7000, 90, 90, 350], 1000, &["s3.com=1/0.5"]);
    let of = |site: &str| large.iter().find(|large| large.site == site).expect("a large site").slices.clone();
    assert_eq!((large.len(), of("s0.com").len(), of("s3.com").len()), (2, 7, 2));
    for number in of("s0.com") {
        let lines = &slices[number as usize];
        assert!(lines.len() == 1000 && lines.iter().all(|line| site(line) == "s0.com"));
        for class in 0..7 {
            let of_class = lines.iter().filter(|line| line.contains(&format!("\tn{class}\t"))).count();
            assert!((90..200).contains(&of_class), "{of_class} of {class}");
        }
    }
    assert_eq!(of("s3.com").map(|number| slices[number as usize].len()).collect::<Vec<_>>(), [175, 175]);
    assert_eq!(slices[0].len(), 180);
    assert!(!slices[1].is_sorted());
    assert_eq!(dealt(&[7000, 90, 90, 350], 1000, &["s3.com=1/0.5"]), (slices, large));
}

proptest! {
    #[test]
    fn every_url_is_dealt_once_and_small_sites_whole(
        urls in prop::collection::vec(0u32..60, 1..40), slice_urls in 1u32..50,
    ) {
        let (slices, large) = dealt(&urls, slice_urls, &[]);
        let key = |line: &String| line.split('\t').next().unwrap_or("").parse().unwrap_or(u32::MAX);
        let mut keys: Vec<u32> = slices.iter().flatten().map(key).collect();
        keys.sort_unstable();
        prop_assert_eq!(keys, (0..urls.iter().sum()).collect::<Vec<_>>());
        let is_large = |number: usize| large.iter().any(|large| large.slices.contains(&(number as u32)));
        let mut met = HashSet::new();
        for (number, lines) in slices.iter().enumerate() {
            prop_assert!(!lines.is_empty() && 2 * lines.len() <= 3 * slice_urls as usize);
            let sites: HashSet<&str> = lines.iter().map(|line| site(line)).collect();
            if is_large(number) {
                prop_assert!(sites.len() == 1 && lines.len() <= slice_urls as usize);
            } else {
                let whole = sites.iter().all(|site| met.insert(site.to_string()));
                prop_assert!(whole, "a small site is in two slices");
            }
        }
        for (n, &urls) in urls.iter().enumerate() {
            let site = format!("s{n}.com");
            prop_assert_eq!(large.iter().any(|large| large.site == site), urls > slice_urls);
        }
    }
}

/// How many pairs of one class there are among what is trained on together, against a uniform shuffle of all: in a
/// lane's part of a batch, and in a whole one. The trainer lays blocks of 2 MiB end to end in a random order, gives
/// each lane an equal part of that line, and shuffles within windows of 128 blocks of all lanes together (`EpochPlan`).
fn pairs_against_uniform(slices: &[Vec<u32>]) -> (f64, f64) {
    const BLOCK: usize = 80;
    const LANES: usize = 8;
    const OF_LANE: usize = 32;
    let mut drawn = 0u64;
    let mut draw = || {
        drawn += 1;
        XxHash64::oneshot(5, &drawn.to_le_bytes())
    };
    let mut blocks: Vec<&[u32]> = slices.iter().flat_map(|slice| slice.chunks(BLOCK)).collect();
    blocks.sort_by_cached_key(|_| draw());
    let line: Vec<u32> = blocks.concat();
    let lanes: Vec<Vec<u32>> = line
        .chunks(line.len().div_ceil(LANES))
        .map(|lane| {
            let mut lane = lane.to_vec();
            lane.chunks_mut(BLOCK * 128 / LANES).for_each(|window| window.sort_by_cached_key(|_| draw()));
            lane
        })
        .collect();
    let mut of_class: HashMap<u32, f64> = HashMap::new();
    line.iter().for_each(|class| *of_class.entry(*class).or_default() += 1.0);
    let pairs = |n: f64| n * (n - 1.0) / 2.0;
    let expected = of_class.values().map(|n| pairs(*n)).sum::<f64>() / pairs(line.len() as f64);
    let against = |groups: &[Vec<u32>]| {
        let (mut same, mut all) = (0.0, 0.0);
        for group in groups {
            let mut counts: HashMap<u32, f64> = HashMap::new();
            group.iter().for_each(|class| *counts.entry(*class).or_default() += 1.0);
            same += counts.values().map(|n| pairs(*n)).sum::<f64>();
            all += pairs(group.len() as f64);
        }
        same / all / expected
    };
    let shares: Vec<Vec<Vec<u32>>> =
        lanes.iter().map(|lane| lane.chunks_exact(OF_LANE).map(<[u32]>::to_vec).collect()).collect();
    let steps = shares.iter().map(Vec::len).min().unwrap_or(0);
    let batches: Vec<Vec<u32>> =
        (0..steps).map(|step| shares.iter().flat_map(|lane| lane[step].iter().copied()).collect()).collect();
    (against(&shares.concat()), against(&batches))
}

/// The classes of a list's URLs, slice by slice, as they are dealt; `entries` are site and class, in the list's order.
fn dealt_classes(entries: impl Iterator<Item = (u32, u32)>, slice_urls: u32) -> Vec<Vec<u32>> {
    let mut spool = Spool::new(None);
    let sites = Sites::new(DEFAULT, []);
    for (key, (site, class)) in entries.enumerate() {
        let (url, class) = (format!("http://s{site}.com/{key}"), class.to_string());
        let entry = Entry {
            site: site_hash(1, &format!("s{site}.com")),
            most: slice_urls,
            hash: XxHash64::oneshot(3, url.as_bytes()),
            key: key as u64,
            synset: class.as_bytes(),
            tail: url.as_bytes(),
        };
        entry.spool(&mut spool).expect("in memory");
    }
    let mut slices = Vec::new();
    let done = deal(spool, None, 1, slice_urls, &sites, &mut |_, mut hand: Hand| {
        let class = |(_, synset, _): (u64, &[u8], &[u8])| std::str::from_utf8(synset).ok()?.parse().ok();
        slices.push(hand.shuffled().filter_map(class).collect::<Vec<u32>>());
        io::Result::Ok(())
    });
    done.expect("in memory");
    slices
}

/// A list sorted by class, of which six in ten URLs are of one site, and the others of sites of so many URLs each.
fn flickr_like(classes: u32, urls: u32, of_small_site: u32) -> impl Iterator<Item = (u32, u32)> {
    let of_class = urls / classes;
    (0..urls).map(move |url| {
        let (class, nth) = (url / of_class, url % of_class);
        if nth % 5 < 3 { (0, class) } else { (1 + url / of_small_site, class) }
    })
}

#[test]
fn classes_come_as_mixed_as_from_a_uniform_shuffle_where_one_site_has_most_of_them() {
    for classes in [3, 20, 1000] {
        let (lane, batch) = pairs_against_uniform(&dealt_classes(flickr_like(classes, 150_000, 15), 1500));
        assert!(lane <= 1.1 && batch <= 1.1, "{classes} classes: {lane} per lane, {batch} per batch");
    }
}

/// What dealing by site costs at the worst: each large site has one class, so that each of its slices has.
#[test]
fn sites_of_one_class_each_are_mixed_as_far_as_a_window_holds_several() {
    for (sites, most_of_lane, most_of_batch) in [(3, 1.2, 1.1), (1000, 80.0, 12.0)] {
        let (lane, batch) =
            pairs_against_uniform(&dealt_classes((0..200_000).map(|url| (url % sites, url % sites)), 100));
        assert!(lane <= most_of_lane && batch <= most_of_batch, "{sites}: {lane} per lane, {batch} per batch");
    }
}

/// So many URLs by default, ten for each site; `URLS` names another number.
const MANY_URLS: u64 = 10_000_000;

/// The number of the `n`-th URL's site: six in ten are of site 0, each other site has one at least, and few have many.
fn site_of(n: u64, sites: u64) -> u64 {
    if n % 10 < 6 {
        return 0;
    }
    match n / 10 * 4 + n % 10 - 6 {
        other if other < sites - 1 => 1 + other,
        other => {
            let drawn = XxHash64::oneshot(9, &other.to_le_bytes()) as f64 / 2f64.powi(64);
            1 + (drawn.powi(3) * (sites - 1) as f64) as u64
        }
    }
}

/// One of its URLs; one site in a hundred is an address.
fn url_of(site: u64, n: u64) -> String {
    match site {
        0 => format!("http://img{}.large.com/{n}.jpg", n % 50),
        site if site % 100 == 7 => {
            let [.., a, b, c] = site.to_be_bytes();
            format!("http://93.{a}.{b}.{c}/{n}.jpg")
        }
        site => format!("http://www{}.s{site}.com/{n}.jpg", n % 3),
    }
}

#[test]
#[ignore = "minutes, to be measured with optimisation"]
fn how_many_sites_of_a_long_list_are_met_by_one_worker_alone() {
    const SLICE_URLS: u32 = 10_000;
    let urls = std::env::var("URLS").map_or(MANY_URLS, |text| text.parse().expect("a number"));
    let site_count = urls / 10;
    let sites = Sites::new(Budget::default(), []);
    let folder = tempfile::tempdir().expect("a folder");
    let folder = Some(folder.path().to_owned());
    let mut spool = Spool::new(folder.clone());
    for n in 0..urls {
        let url = url_of(site_of(n, site_count), n);
        let site = sites.of_url(&url).expect("a URL");
        let (most, hash) = (most_of_site(sites.budget(&site), SLICE_URLS), XxHash64::oneshot(3, url.as_bytes()));
        let entry = Entry { site: site_hash(1, &site), most, hash, key: n, synset: b"n1", tail: url.as_bytes() };
        entry.spool(&mut spool).expect("there is room");
    }
    // Of each site its URLs, and the slice in which it is; `SEVERAL` of them.
    const NONE: u32 = u32::MAX;
    const SEVERAL: u32 = u32::MAX - 1;
    let mut met = vec![(0u64, NONE); site_count as usize];
    let (mut slices, mut fullest) = (0, 0);
    let large = deal(spool, folder, 1, SLICE_URLS, &sites, &mut |number, mut hand: Hand| {
        (slices, fullest) = (slices + 1, fullest.max(hand.len()));
        for (key, ..) in hand.shuffled() {
            let (urls, slice) = &mut met[site_of(key, site_count) as usize];
            *urls += 1;
            *slice = if *slice == NONE || *slice == number { number } else { SEVERAL };
        }
        io::Result::Ok(())
    });
    let large = large.expect("there is room");
    assert_eq!(met.iter().map(|(urls, _)| urls).sum::<u64>(), urls, "each is dealt once");
    let alone = || met.iter().filter(|(_, slice)| *slice < SEVERAL);
    let (count, of_those) = (alone().count() as u64, alone().map(|(urls, _)| urls).sum::<u64>());
    let share = count as f64 / site_count as f64;
    println!(
        "dealing: urls={urls} sites={site_count} sites_of_one_slice={count} share={share:.6} urls_of_those={of_those} \
         large_sites={} slices={slices} largest_slice={fullest}",
        large.len()
    );
    assert_eq!(site_count - count, large.len() as u64, "only large sites have slices of their own");
    assert!(share > 0.99, "{share}");
}
