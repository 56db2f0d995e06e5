//! How the links of an old URL list die, how many die each way, and what a right worker makes of each.

use proto::{Outcome, Rejection};

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

            /// What a worker with the default limits, which may reach loopback and nothing else that is private, makes
            /// of it. Whether the manifest then counts it is another question: `list::Entry::counts`.
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
