//! What a URL of the origin serves: a function of its path and of the origin's seed. `/KIND/CLASS/NUMBER/n.jpg` shows
//! picture `NUMBER` of `CLASS` in the manner of [`Rot`] `KIND`; `/files/...` serves a folder's files.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustls::ServerConfig;
use tokio::sync::Semaphore;

use crate::bodies;
use crate::pictures::CLASSES;
use crate::rot::Rot;

const JPEG: &str = "Content-Type: image/jpeg\r\n";
const HTML: &str = "Content-Type: text/html\r\n";
const CHUNKED: &str = "HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n";

/// How an origin differs from the usual one.
#[derive(Debug, Clone)]
pub struct Options {
    /// Decides every picture.
    pub seed: u64,
    /// Addresses that it listens at, each a host of its own to clients: 127.0.0.1 and so on.
    pub hosts: usize,
    /// Served under `/files/`.
    pub files: Option<PathBuf>,
    /// Goes by before each answer.
    pub delay: Duration,
    /// Requests a second of one host, above which it answers 429; 0: it bears any.
    pub bears: f64,
    /// JPEGs that are shown instead of drawings, each under many numbers, made a different file by a comment that holds
    /// the number. Formats other than plain JPEG are drawn all the same.
    pub photos: Vec<Bytes>,
    /// Speaks HTTPS instead of HTTP.
    pub tls: Option<Arc<ServerConfig>>,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 0, hosts: 4, files: None, delay: Duration::ZERO, bears: 0.0, photos: Vec::new(), tls: None }
    }
}

/// Answers to whatever is asked of an origin's hosts.
pub(crate) struct Site {
    pub(crate) options: Options,
    /// Each `address:port`.
    pub(crate) hosts: Vec<String>,
    /// Pictures are drawn by as many threads as there are cores.
    drawing: Semaphore,
}

/// What is sent, in this order.
pub(crate) struct Response {
    pub(crate) head: Vec<u8>,
    pub(crate) body: Bytes,
    pub(crate) then: AfterBody,
}

pub(crate) enum AfterBody {
    /// The next request of the same connection.
    Next,
    Close,
    Reset,
    Drip,
    Stream,
    Silence,
}

impl Response {
    /// A whole answer with a right Content-Length; `headers` are lines that end in CRLF.
    fn whole(status: &str, headers: &str, body: impl Into<Bytes>) -> Self {
        let body = body.into();
        Self::part(status, headers, body.len(), body, AfterBody::Next)
    }

    /// An answer that announces `length` bytes, whatever its body has.
    fn part(status: &str, headers: &str, length: usize, body: impl Into<Bytes>, then: AfterBody) -> Self {
        let head = format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\n\r\n").into_bytes();
        Self { head, body: body.into(), then }
    }

    fn raw(head: impl Into<Vec<u8>>, body: impl Into<Bytes>, then: AfterBody) -> Self {
        Self { head: head.into(), body: body.into(), then }
    }

    fn redirect(status: &str, to: &str) -> Self {
        Self::whole(status, &format!("Location: {to}\r\n"), Bytes::new())
    }

    fn not_found() -> Self {
        Self::whole("404 Not Found", "Content-Type: text/html\r\n", "<h1>Not found</h1>\n")
    }

    pub(crate) fn too_many_requests() -> Self {
        Self::whole("429 Too Many Requests", "", Bytes::new())
    }
}

impl Site {
    pub(crate) fn new(options: Options, hosts: Vec<String>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { options, hosts, drawing: Semaphore::new(cores) }
    }

    /// One of the photos, if there are any and `rot` shows plain ones.
    fn shown(&self, rot: Rot, class: usize, number: u64) -> Option<Bytes> {
        let photos = self.options.photos.len() as u64;
        if photos == 0 || rot.is_converted() {
            return None;
        }
        let photo = &self.options.photos[((number * CLASSES.len() as u64 + class as u64) % photos) as usize];
        Some(bodies::with_segment(photo, 0xfe, format!("{class}/{number}").as_bytes()).into())
    }

    /// `http` or `https`.
    pub(crate) fn scheme(&self) -> &'static str {
        if self.options.tls.is_some() { "https" } else { "http" }
    }

    /// What `host` answers to a request for `path`.
    pub(crate) async fn answer(&self, host: &str, path: &str) -> Response {
        let path = path.trim_start_matches('/');
        if let Some(name) = path.strip_prefix("files/") {
            return self.file(name).await;
        }
        match path {
            "gone-small.jpg" => return Response::whole("200 OK", JPEG, bodies::placeholder(false)),
            "gone-large.jpg" => return Response::whole("200 OK", JPEG, bodies::placeholder(true)),
            _ if path.starts_with("login/") => return Response::whole("200 OK", HTML, bodies::html(path)),
            _ => {}
        }
        match parse(path) {
            Some((rot, class, number, n)) => self.rotten(host, rot, (class, number), n).await,
            None => Response::not_found(),
        }
    }

    async fn rotten(&self, host: &str, rot: Rot, (class, number): (usize, u64), n: u64) -> Response {
        let seed = self.options.seed;
        let photo = async || match self.shown(rot, class, number) {
            Some(photo) => photo,
            None => self.drawn(move || bodies::photo(rot, seed, class, number).into()).await,
        };
        match rot {
            Rot::Good
            | Rot::Copy
            | Rot::OtherClass
            | Rot::Exif
            | Rot::Cmyk
            | Rot::Grey
            | Rot::Progressive
            | Rot::Thumbnail => Response::whole("200 OK", JPEG, photo().await),
            Rot::Png | Rot::AlphaPng => Response::whole("200 OK", "Content-Type: image/png\r\n", photo().await),
            Rot::Webp => Response::whole("200 OK", "Content-Type: image/webp\r\n", photo().await),
            Rot::Gif => Response::whole("200 OK", "Content-Type: image/gif\r\n", photo().await),
            // What many servers say of these.
            Rot::Bmp | Rot::Tiff => {
                Response::whole("200 OK", "Content-Type: application/octet-stream\r\n", photo().await)
            }
            Rot::OptedOut => Response::whole("200 OK", &format!("{JPEG}X-Robots-Tag: noai\r\n"), photo().await),
            Rot::Moved => {
                let next = self.hosts.iter().position(|h| h == host).map_or(0, |at| (at + 1) % self.hosts.len());
                let (scheme, kind) = (self.scheme(), Rot::Good.name());
                let to = format!("{scheme}://{}/{kind}/{class}/{number}/{n}.jpg", self.hosts[next]);
                Response::redirect("301 Moved Permanently", &to)
            }
            Rot::Placeholder => Response::redirect("302 Found", "/gone-small.jpg"),
            Rot::LargePlaceholder => Response::redirect("302 Found", "/gone-large.jpg"),
            Rot::HtmlAfterRedirect => Response::redirect("302 Found", &format!("/login/{n}")),
            Rot::Loop => Response::redirect("302 Found", &format!("/{}/{class}/{number}/{}.jpg", rot.name(), n ^ 1)),
            Rot::Private => {
                const TARGETS: [&str; 4] =
                    ["10.0.0.1/photo.jpg", "169.254.169.254/latest/meta-data/", "192.168.1.1/", "[fd00::1]/photo.jpg"];
                Response::redirect("302 Found", &format!("http://{}", TARGETS[(n % 4) as usize]))
            }
            Rot::NotFound => Response::not_found(),
            Rot::Gone => Response::whole("410 Gone", HTML, "<h1>Gone</h1>\n"),
            Rot::Forbidden => Response::whole("403 Forbidden", HTML, "<h1>Forbidden</h1>\n"),
            Rot::ServerError => Response::whole("500 Internal Server Error", HTML, "<h1>Error</h1>\n"),
            Rot::Unavailable => {
                Response::whole("503 Service Unavailable", &format!("{HTML}Retry-After: 1\r\n"), "<h1>Try later</h1>\n")
            }
            Rot::HtmlAsJpeg => Response::whole("200 OK", JPEG, bodies::html(&format!("photo {n}"))),
            Rot::TinyGif => Response::whole("200 OK", "Content-Type: image/gif\r\n", bodies::TINY_GIF),
            Rot::Empty => Response::whole("200 OK", JPEG, Bytes::new()),
            Rot::RandomBytes => Response::whole("200 OK", JPEG, bodies::random_bytes(n, 20_000)),
            Rot::Truncated => {
                let photo = photo().await;
                Response::whole("200 OK", JPEG, photo.slice(..photo.len() * 3 / 5))
            }
            Rot::ShortBody | Rot::Reset => {
                let photo = photo().await;
                let then = if rot == Rot::Reset { AfterBody::Reset } else { AfterBody::Close };
                Response::part("200 OK", JPEG, photo.len(), photo.slice(..photo.len() / 2), then)
            }
            Rot::LongBody => {
                let photo = photo().await;
                Response::part("200 OK", JPEG, photo.len() / 2, photo, AfterBody::Close)
            }
            // 8,000 bytes of a chunk that announces 32,768.
            Rot::CutChunk => {
                Response::raw(format!("{CHUNKED}8000\r\n"), photo().await.slice(..8_000), AfterBody::Close)
            }
            Rot::Garbage => Response::raw(bodies::random_bytes(n, 2_000), Bytes::new(), AfterBody::Close),
            Rot::PngBomb => {
                Response::whole("200 OK", "Content-Type: image/png\r\n", self.drawn(bodies::png_bomb).await)
            }
            Rot::GzipBomb => Response::whole(
                "200 OK",
                &format!("{JPEG}Content-Encoding: gzip\r\n"),
                self.drawn(bodies::gzip_bomb).await,
            ),
            Rot::Endless => Response::raw(CHUNKED, Bytes::new(), AfterBody::Stream),
            Rot::Drip => Response::part("200 OK", JPEG, 60_000, Bytes::new(), AfterBody::Drip),
            // The URLs of the last four name other hosts or none; whoever asks here all the same hears nothing either.
            Rot::Silent | Rot::DeadHost | Rot::RefusedPort | Rot::Unparsable | Rot::OtherScheme => {
                Response::raw(Vec::new(), Bytes::new(), AfterBody::Silence)
            }
        }
    }

    /// Runs `draw` on a thread on which computing hurts nobody.
    async fn drawn(&self, draw: impl FnOnce() -> Bytes + Send + 'static) -> Bytes {
        let _permit = self.drawing.acquire().await.expect("never closed");
        tokio::task::spawn_blocking(draw).await.expect("drawing does not panic")
    }

    async fn file(&self, name: &str) -> Response {
        let Some(folder) = &self.options.files else { return Response::not_found() };
        if name.split(['/', '\\']).any(|part| part == "..") {
            return Response::not_found();
        }
        match tokio::fs::read(folder.join(name)).await {
            Ok(bytes) => Response::whole("200 OK", "Content-Type: application/octet-stream\r\n", bytes),
            Err(_) => Response::not_found(),
        }
    }
}

/// `KIND/CLASS/NUMBER/N.jpg`.
fn parse(path: &str) -> Option<(Rot, usize, u64, u64)> {
    let mut parts = path.strip_suffix(".jpg")?.split('/');
    let rot = Rot::from_name(parts.next()?)?;
    let class = parts.next()?.parse().ok().filter(|&class| class < CLASSES.len())?;
    let parsed = (rot, class, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().is_none().then_some(parsed)
}
