//! A rotted URL list of ImageNet's kind: how links die, how many die each way, and what a right worker makes of each.

use std::collections::HashMap;
use std::fmt::Write;

use proto::{Outcome, Rejection};

use crate::origin::Origin;
use crate::pictures::{CLASSES, Random};

macro_rules! rots {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal, $share:literal, $expected:expr;)+) => {
        /// What is behind one URL of the list.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Rot {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Rot {
            /// Every kind.
            pub const ALL: &[Rot] = &[$(Rot::$variant),+];

            /// Its name, which is the first part of its URLs' paths.
            pub fn name(self) -> &'static str {
                match self { $(Rot::$variant => $name),+ }
            }

            /// How many of 10,000 URLs are so; those that are left over are [`Rot::Good`].
            pub fn share(self) -> usize {
                match self { $(Rot::$variant => $share),+ }
            }

            /// What a worker with the default limits, which may reach loopback and nothing else that is private, makes of it.
            /// Whether the manifest then counts it is another question: [`Entry::counts`].
            pub fn expected(self) -> Outcome {
                match self { $(Rot::$variant => $expected),+ }
            }
        }
    };
}

const KEPT: Outcome = Ok(());

rots! {
    /// A photo.
    Good = "photo", 0, KEPT;
    /// 301 to a photo, on another host if there is one.
    Moved = "moved", 300, KEPT;
    /// 404.
    NotFound = "not-found", 1200, Err(Rejection::NotFound);
    /// 302 to a picture of about 2.3 kB that says that the photo is gone.
    Placeholder = "placeholder", 800, Err(Rejection::TooSmall);
    /// 302 to such a picture of 132 kB. In no worker's list; only the manifest, which sees all its URLs, can know it.
    LargePlaceholder = "large-placeholder", 150, KEPT;
    /// The host's name no longer resolves.
    DeadHost = "dead-host", 350, Err(Rejection::Dns);
    /// The port refuses connections.
    RefusedPort = "refused-port", 250, Err(Rejection::Connect);
    /// An HTML page that calls itself a JPEG.
    HtmlAsJpeg = "html-as-jpeg", 250, Err(Rejection::NotAnImage);
    /// 302 to an HTML page.
    HtmlAfterRedirect = "html-after-redirect", 250, Err(Rejection::NotAnImage);
    /// 410.
    Gone = "gone", 250, Err(Rejection::NotFound);
    /// The first part of a JPEG, with the Content-Length of that part.
    Truncated = "truncated", 200, Err(Rejection::Truncated);
    /// 403.
    Forbidden = "forbidden", 70, Err(Rejection::HttpStatus);
    /// 500.
    ServerError = "server-error", 50, Err(Rejection::HttpStatus);
    /// 503 with Retry-After: 1, each time.
    Unavailable = "unavailable", 40, Err(Rejection::HttpStatus);
    /// The connection is closed before Content-Length is reached.
    ShortBody = "short-body", 20, Err(Rejection::Protocol);
    /// Content-Length is reached before the photo ends, but more is sent.
    LongBody = "long-body", 15, Err(Rejection::Truncated);
    /// The connection is reset within the body.
    Reset = "reset", 20, Err(Rejection::Protocol);
    /// A chunked body that ends within a chunk.
    CutChunk = "cut-chunk", 10, Err(Rejection::Protocol);
    /// An answer that is not HTTP.
    Garbage = "garbage", 10, Err(Rejection::Protocol);
    /// A GIF of one pixel.
    TinyGif = "tiny-gif", 20, Err(Rejection::TooSmall);
    /// A JPEG of 60 x 45 pixels, heavy with metadata.
    Thumbnail = "thumbnail", 20, Err(Rejection::TooFewPixels);
    /// No bytes.
    Empty = "empty", 20, Err(Rejection::TooSmall);
    /// Bytes without meaning under image/jpeg.
    RandomBytes = "random-bytes", 10, Err(Rejection::NotAnImage);
    /// A PNG.
    Png = "png", 30, KEPT;
    /// A WebP.
    Webp = "webp", 15, KEPT;
    /// A GIF of photo size.
    Gif = "gif", 15, KEPT;
    /// A BMP.
    Bmp = "bmp", 5, KEPT;
    /// A TIFF.
    Tiff = "tiff", 5, KEPT;
    /// A PNG that is transparent towards its edges.
    AlphaPng = "alpha-png", 10, KEPT;
    /// A JPEG that lies on its side, and says so in EXIF.
    Exif = "exif", 20, KEPT;
    /// A JPEG of four inks, as Adobe writes them.
    Cmyk = "cmyk", 10, KEPT;
    /// A grey JPEG.
    Grey = "grey", 20, KEPT;
    /// A progressive JPEG.
    Progressive = "progressive", 20, KEPT;
    /// A photo with `X-Robots-Tag: noai`.
    OptedOut = "opted-out", 10, Err(Rejection::OptedOut);
    /// Text that is no URL.
    Unparsable = "unparsable", 10, Err(Rejection::BadUrl);
    /// A `file:` or `ftp:` URL.
    OtherScheme = "other-scheme", 5, Err(Rejection::BadUrl);
    /// Two URLs that redirect to each other.
    Loop = "loop", 5, Err(Rejection::RedirectLimit);
    /// 302 to a private network or a cloud's metadata service.
    Private = "private", 6, Err(Rejection::BlockedAddress);
    /// A well-formed PNG of 400 million pixels in 0.4 MB.
    PngBomb = "png-bomb", 3, Err(Rejection::TooManyPixels);
    /// 1 GB of zeros in 1 MB, under Content-Encoding: gzip.
    GzipBomb = "gzip-bomb", 3, Err(Rejection::NotAnImage);
    /// 300 MB of no format that no Content-Length announces.
    Endless = "endless", 2, Err(Rejection::NotAnImage);
    /// One byte every half second.
    Drip = "drip", 3, Err(Rejection::Timeout);
    /// A server that accepts, reads and says nothing.
    Silent = "silent", 3, Err(Rejection::Timeout);
    /// The very picture of a [`Rot::Good`] URL of the same class.
    Copy = "copy", 15, KEPT;
    /// The very picture of a [`Rot::Good`] URL of another class.
    OtherClass = "other-class", 8, KEPT;
}

impl Rot {
    /// The kind with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|rot| rot.name() == name)
    }

    /// Whether it shows its picture in another form than that of [`Rot::Good`].
    pub(crate) fn is_converted(self) -> bool {
        use Rot::{AlphaPng, Bmp, Cmyk, Exif, Gif, Grey, Png, Progressive, Thumbnail, Tiff, Webp};
        matches!(self, Png | Webp | Gif | Bmp | Tiff | AlphaPng | Exif | Cmyk | Grey | Progressive | Thumbnail)
    }

    /// Whether the picture that is kept of it, if one is, is not the one that its class promises.
    pub fn is_poison(self) -> bool {
        self == Rot::LargePlaceholder || self.expected().is_err() && self != Rot::OptedOut
    }
}

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
    /// Whether the manifest counts it, if it is kept: placeholders and pictures under several classes it skips wholly, and
    /// of copies within a class it counts one, here the original (it counts the one with the lowest key).
    pub counts: bool,
}

/// The list: `per_class` URLs for each of [`CLASSES`], shuffled, rotted in the shares of [`Rot::share`]; from 200 URLs on, every
/// kind is there. URLs are spread over the origin's hosts.
pub fn list(seed: u64, per_class: usize, origin: &Origin) -> Vec<Entry> {
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
        let entries = list(1, 500, &origin);
        assert_eq!(entries, list(1, 500, &origin));
        assert_ne!(entries, list(2, 500, &origin));
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
        let entries = list(3, 10, &origin);
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
