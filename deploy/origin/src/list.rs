//! A rotted URL list of ImageNet's kind, over the hosts of an [`Origin`].

use std::collections::HashMap;
use std::fmt::Write;

use crate::origin::Origin;
use crate::pictures::{CLASSES, Random};
use crate::rot::Rot;

/// One line of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Of the class under which the URL is listed.
    pub synset: &'static str,
    /// Unique in the list.
    pub url: String,
    /// What is behind it.
    pub rot: Rot,
    /// Class and number of the picture that it shows, if it shows one.
    pub picture: (usize, u64),
    /// Whether the manifest counts it, if it is kept: placeholders and pictures under several classes it skips wholly,
    /// and of copies within a class it counts one, here the original (it counts the one with the lowest key).
    pub counts: bool,
}

/// The list: `per_class` URLs for each of [`CLASSES`], shuffled, rotted in the shares of [`Rot::share`]; from 200 URLs
/// on, every kind is there. URLs are spread over the origin's hosts.
pub fn rotted(seed: u64, per_class: usize, origin: &Origin) -> Vec<Entry> {
    let total = per_class * CLASSES.len();
    let mut rots = Vec::with_capacity(total);
    for &rot in Rot::ALL {
        let share = (total * rot.share() + 5_000) / 10_000;
        let count = match rot {
            Rot::Good => 0,
            // Each costs a worker its whole deadline.
            Rot::Drip | Rot::Silent | Rot::Endless => share.min(4),
            _ => share,
        };
        rots.extend(std::iter::repeat_n(rot, count.max(usize::from(rot != Rot::Good && total >= 200))));
    }
    rots.truncate(total);
    rots.resize(total, Rot::Good);
    let mut random = Random::new(&[seed, 2]);
    shuffle(&mut rots, &mut random);

    // `rots[i]` is of class `i % CLASSES.len()`; the photos that copies can be made of, by class.
    let good = |class: usize| {
        let here = (class..total).step_by(CLASSES.len());
        here.filter(|&i| rots[i] == Rot::Good).collect::<Vec<_>>()
    };
    let mut originals: Vec<Vec<usize>> = (0..CLASSES.len()).map(good).collect();
    let mut twice = HashMap::new();
    let mut entries: Vec<Entry> = (0..total)
        .map(|i| {
            let class = i % CLASSES.len();
            let mut rot = rots[i];
            let shown_class = if rot == Rot::OtherClass { (class + 1) % CLASSES.len() } else { class };
            let original = matches!(rot, Rot::Copy | Rot::OtherClass).then(|| originals[shown_class].pop());
            let shown = match original {
                None => i,
                Some(Some(original)) => {
                    twice.insert(original, rot);
                    original
                }
                // A list so short that the class has no photo left to copy.
                Some(None) => {
                    rot = Rot::Good;
                    i
                }
            };
            let picture = if rot == Rot::Good { (class, i as u64) } else { (shown_class, shown as u64) };
            let counts = rot.expected().is_ok() && !matches!(rot, Rot::LargePlaceholder | Rot::Copy | Rot::OtherClass);
            Entry { synset: CLASSES[class].synset, url: url(rot, picture, i as u64, origin), rot, picture, counts }
        })
        .collect();
    for (original, rot) in twice {
        entries[original].counts = rot == Rot::Copy;
    }
    shuffle(&mut entries, &mut random);
    entries
}

/// The URL number `n` that shows picture `(class, number)` in the manner of `rot`.
pub fn url(rot: Rot, (class, number): (usize, u64), n: u64, origin: &Origin) -> String {
    let path = format!("{}/{class}/{number}/{n}.jpg", rot.name());
    match rot {
        Rot::DeadHost => format!("http://gone-{}.invalid/{path}", n % 97),
        Rot::RefusedPort => format!("http://{}/{path}", origin.refused()),
        Rot::Unparsable => match n % 4 {
            0 => format!("http://[broken/{path}"),
            1 => format!("http://photos.example:port/{path}"),
            2 => format!("//{path}"),
            _ => format!("http://%/{path}"),
        },
        Rot::OtherScheme if n.is_multiple_of(2) => format!("file:///{path}"),
        Rot::OtherScheme => format!("ftp://photos.example/{path}"),
        _ => format!("{}://{}/{path}", origin.scheme(), origin.hosts()[(n % origin.hosts().len() as u64) as usize]),
    }
}

/// The list as people write it: `synset<TAB>url`, one line each.
pub fn to_text(entries: &[Entry]) -> String {
    entries.iter().fold(String::new(), |mut text, entry| {
        writeln!(text, "{}\t{}", entry.synset, entry.url).expect("a String takes all");
        text
    })
}

/// Fisher and Yates.
fn shuffle<T>(items: &mut [T], random: &mut Random) {
    for i in (1..items.len()).rev() {
        items.swap(i, random.below(i as u32 + 1) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[tokio::test]
    async fn a_list_keeps_the_shares_and_is_a_function_of_its_seed() {
        let origin = Origin::start(1).await.expect("loopback");
        let entries = rotted(1, 500, &origin);
        assert_eq!(entries, rotted(1, 500, &origin));
        assert_ne!(entries, rotted(2, 500, &origin));
        assert_eq!(entries.len(), 10_000);
        let count = |rot| entries.iter().filter(|entry| entry.rot == rot).count();
        for &rot in Rot::ALL.iter().filter(|&&rot| rot != Rot::Good) {
            assert_eq!(count(rot), rot.share(), "{rot:?}");
        }
        assert!((5_300..5_700).contains(&count(Rot::Good)), "{}", count(Rot::Good));
        let urls: HashSet<_> = entries.iter().map(|entry| &entry.url).collect();
        assert_eq!(urls.len(), entries.len());
        for class in &CLASSES {
            assert_eq!(entries.iter().filter(|entry| entry.synset == class.synset).count(), 500);
        }
    }

    #[tokio::test]
    async fn a_short_list_has_every_kind_and_each_copy_its_original() {
        let origin = Origin::start(1).await.expect("loopback");
        let entries = rotted(3, 10, &origin);
        assert_eq!(entries.iter().map(|entry| entry.rot).collect::<HashSet<_>>().len(), Rot::ALL.len());
        for copy in entries.iter().filter(|entry| matches!(entry.rot, Rot::Copy | Rot::OtherClass)) {
            let original = entries.iter().find(|entry| entry.rot == Rot::Good && entry.picture == copy.picture);
            let original = original.expect("the list holds what is copied");
            assert_eq!(original.synset == copy.synset, copy.rot == Rot::Copy);
            assert_eq!(original.counts, copy.rot == Rot::Copy);
        }
        for entry in &entries {
            let scheme = reqwest::Url::parse(&entry.url).ok().map(|url| url.scheme().to_owned());
            match entry.rot {
                Rot::Unparsable => assert_eq!(scheme, None, "{}", entry.url),
                Rot::OtherScheme => assert_ne!(scheme.as_deref(), Some("http"), "{}", entry.url),
                _ => assert_eq!(scheme.as_deref(), Some("http"), "{}", entry.url),
            }
        }
        for n in 0..4 {
            let url = url(Rot::Unparsable, (0, n), n, &origin);
            assert!(reqwest::Url::parse(&url).is_err(), "{url}");
        }
    }
}
