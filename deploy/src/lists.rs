//! Reads lists of URLs wherever they are and streams them up as they are; the coordinator parses them.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt, TryStreamExt};
use proto::Class;
use proto::pb::CreateDatasetRequest;
use proto::pb::create_dataset_request::{Part, Source as SourceHead};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;
use url::Url;

use crate::exit::Ended;
use crate::imports::Files;

/// Bytes in one message.
const PIECE: usize = 256 << 10;
/// A list's server must say something at least so often.
const SILENCE: Duration = Duration::from_secs(60);
/// Templates are asked for so many synsets at once.
const ASKED_AT_ONCE: usize = 4;

/// Where a list is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// Standard input.
    Stdin,
    /// A file.
    File(PathBuf),
    /// An http(s) address.
    Http(Url),
    /// An address with `{synset}` in it, which answers one URL a line, asked for each synset.
    Template {
        /// The address.
        address: String,
        /// What is asked for.
        synsets: Vec<String>,
    },
    /// Pictures that are there already, a JSON object for each.
    Files(Box<Files>),
}

/// What is sent up; the last is `None`. A stream that ends without it broke off, and must never be taken for a whole
/// list.
pub(crate) type Piece = Option<CreateDatasetRequest>;

impl Source {
    /// `-`, an http(s) address, or a file that exists.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        if text == "-" {
            return Ok(Self::Stdin);
        }
        if text.starts_with("http://") || text.starts_with("https://") {
            return Ok(Self::Http(Url::parse(text).map_err(|e| Ended::usage(format!("--urls {text}: {e}")))?));
        }
        match std::fs::metadata(text) {
            Ok(file) if !file.is_dir() => Ok(Self::File(text.into())),
            Ok(_) => Err(Ended::usage(format!("--urls {text}: is a folder; name its files"))),
            Err(e) => Err(Ended::usage(format!("--urls {text}: {e}"))),
        }
    }

    /// An address that must hold `{synset}`.
    pub(crate) fn template(address: &str, synsets: &[Class]) -> Result<Self> {
        let synsets: Vec<String> = synsets.iter().map(|class| class.synset.clone()).collect();
        let first = synsets.first().ok_or_else(|| Ended::usage("--url-template needs --synsets with at least one"))?;
        if !address.contains("{synset}") || Url::parse(&address.replace("{synset}", first)).is_err() {
            return Err(Ended::usage(format!(
                "--url-template {address}: must be an http(s) address with {{synset}} in it"
            )));
        }
        Ok(Self::Template { address: address.to_owned(), synsets })
    }

    /// Whether it can be read a second time.
    pub(crate) fn repeats(&self) -> bool {
        !matches!(self, Self::Stdin)
    }

    /// Sends its head and all its bytes.
    ///
    /// # Errors
    /// If it cannot be read to its end.
    pub(crate) async fn send(&self, pieces: &mpsc::Sender<Piece>) -> Result<()> {
        match self {
            Self::Stdin => {
                let stdin = std::fs::File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
                send_reader("standard input", tokio::fs::File::from_std(stdin), pieces).await
            }
            Self::File(path) => {
                let file = tokio::fs::File::open(path).await.with_context(|| path.display().to_string())?;
                send_reader(&path.display().to_string(), file, pieces).await
            }
            Self::Http(url) => send_http(url, pieces).await,
            Self::Template { address, synsets } => send_template(address, synsets, pieces).await,
            Self::Files(files) => send_files(files, pieces).await,
        }
    }
}

/// The requests that go up: all pieces until the end is marked; without the mark it never ends, so that the connection
/// breaks instead.
pub(crate) fn requests(pieces: mpsc::Receiver<Piece>) -> impl Stream<Item = CreateDatasetRequest> + Send + 'static {
    stream::unfold(pieces, |mut pieces| async {
        match pieces.recv().await {
            Some(Some(request)) => Some((request, pieces)),
            Some(None) => None,
            None => std::future::pending().await,
        }
    })
}

async fn send_part(part: Part, pieces: &mpsc::Sender<Piece>) -> Result<()> {
    // The call has ended; its answer says why.
    pieces.send(Some(CreateDatasetRequest { part: Some(part) })).await.context("the upload was refused")
}

async fn send_head(name: &str, pieces: &mpsc::Sender<Piece>) -> Result<()> {
    send_part(Part::Source(SourceHead { name: name.to_owned() }), pieces).await
}

async fn send_reader(name: &str, mut reader: impl AsyncRead + Unpin, pieces: &mpsc::Sender<Piece>) -> Result<()> {
    send_head(name, pieces).await?;
    loop {
        let mut data = Vec::with_capacity(PIECE);
        // Fills the piece: a pipe gives a few KB at a time.
        let read = (&mut reader).take(PIECE as u64).read_to_end(&mut data).await;
        if read.with_context(|| format!("cannot read {name}"))? == 0 {
            return Ok(());
        }
        send_part(Part::Data(data.into()), pieces).await?;
    }
}

async fn send_http(url: &Url, pieces: &mpsc::Sender<Piece>) -> Result<()> {
    let response = get(&http_client()?, url.as_str()).await?;
    // The coordinator tells compression by the name's ending; what the server compressed on the way counts too.
    let encoded = response.headers().get("content-encoding").is_some_and(|encoding| encoding == "gzip");
    let ending = if encoded && !url.path().ends_with(".gz") { ".gz" } else { "" };
    send_head(&format!("{}{ending}", url.path().rsplit('/').next().unwrap_or_default()), pieces).await?;
    let mut body = response.bytes_stream();
    while let Some(data) = body.next().await {
        let data = data.with_context(|| format!("{url} broke off"))?;
        for start in (0..data.len()).step_by(PIECE) {
            let piece: Bytes = data.slice(start..data.len().min(start + PIECE));
            send_part(Part::Data(piece), pieces).await?;
        }
    }
    Ok(())
}

async fn send_template(address: &str, synsets: &[String], pieces: &mpsc::Sender<Piece>) -> Result<()> {
    let client = http_client()?;
    send_head("url-template", pieces).await?;
    let client = &client;
    let answers = stream::iter(synsets).map(|synset| async move {
        let url = address.replace("{synset}", synset);
        let text = async { Ok(get(client, &url).await?.text().await?) };
        anyhow::Ok(lines_of(synset, &text.await.map_err(|e: anyhow::Error| e.context(format!("synset {synset}")))?))
    });
    let mut answers = answers.buffered(ASKED_AT_ONCE);
    while let Some(lines) = answers.try_next().await? {
        for piece in lines.as_bytes().chunks(PIECE) {
            send_part(Part::Data(Bytes::copy_from_slice(piece)), pieces).await?;
        }
    }
    Ok(())
}

async fn send_files(files: &Files, pieces: &mpsc::Sender<Piece>) -> Result<()> {
    send_head("files", pieces).await?;
    let (files, pieces) = (files.clone(), pieces.clone());
    let send = move || {
        let mut text = Vec::with_capacity(2 * PIECE);
        let send = |text: &mut Vec<u8>| {
            let part = Part::Data(std::mem::replace(text, Vec::with_capacity(2 * PIECE)).into());
            let sent = pieces.blocking_send(Some(CreateDatasetRequest { part: Some(part) }));
            sent.context("the upload was refused")
        };
        files.each(&mut |line| {
            serde_json::to_writer(&mut text, line)?;
            text.push(b'\n');
            if text.len() < PIECE { Ok(()) } else { send(&mut text) }
        })?;
        send(&mut text)
    };
    tokio::task::spawn_blocking(send).await?
}

/// `synset<TAB>url` for each URL of an answer.
fn lines_of(synset: &str, answer: &str) -> String {
    let urls = answer.lines().map(str::trim).filter(|line| !line.is_empty());
    urls.map(|url| format!("{synset}\t{url}\n")).collect()
}

fn http_client() -> Result<reqwest::Client> {
    // Lists go up as they are.
    let client = reqwest::Client::builder().no_gzip().connect_timeout(Duration::from_secs(10)).read_timeout(SILENCE);
    Ok(client.build()?)
}

/// A successful response; tried three times.
async fn get(client: &reqwest::Client, url: &str) -> Result<reqwest::Response> {
    let ask = async || client.get(url).send().await.and_then(reqwest::Response::error_for_status);
    ask.retry(ExponentialBuilder::new().with_min_delay(Duration::from_secs(1)).with_max_times(2))
        .when(|error| !error.status().is_some_and(|status| status.is_client_error()))
        .await
        .with_context(|| format!("cannot read the list {url}"))
}

/// The classes of a file that `flag` names: `synset`, a tab, a comma or, behind a word with a digit in it as ids have,
/// a blank, and a name for people, which may be missing. A line without any of these is a class, perhaps with blanks in
/// it. Empty lines and those that begin with `#` are left out, and so is the header of Open Images' class descriptions.
pub(crate) fn parse_synsets(flag: &str, text: &str) -> Result<Vec<Class>> {
    let mut classes = Vec::new();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    for line in lines.filter(|line| *line != "LabelName,DisplayName") {
        let is_id = |word: &str| word.contains(|c: char| c.is_ascii_digit());
        let by_blank = || line.split_once(char::is_whitespace).filter(|(word, _)| is_id(word));
        let split = line.split_once('\t').or_else(|| line.split_once(',').filter(|(word, _)| !word.contains(' ')));
        let (synset, name) = split.or_else(by_blank).or_else(|| line.split_once(',')).unwrap_or((line, ""));
        let synset = synset.trim();
        let name = name.trim().trim_matches('"').trim();
        classes.push(Class { synset: synset.to_owned(), name: name.to_owned() });
    }
    ensure!(!classes.is_empty(), Ended::usage(format!("{flag}: the file names no synset")));
    Ok(classes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[test]
    fn synset_files_have_names_comments_and_blank_lines() {
        let parse_synsets = |text| parse_synsets("--synsets", text);
        let classes = parse_synsets("# ours\nn02084071\tdog, domestic dog\n\n  n02121620 cat\r\nn1\n").expect("three");
        let pairs: Vec<(&str, &str)> =
            classes.iter().map(|class| (class.synset.as_str(), class.name.as_str())).collect();
        assert_eq!(pairs, [("n02084071", "dog, domestic dog"), ("n02121620", "cat"), ("n1", "")]);
        let named =
            parse_synsets("golden retriever\nborder collie,a dog\n金毛 犬\tdog\nn1 dog, domestic dog\n").expect("four");
        let pairs: Vec<(&str, &str)> = named.iter().map(|class| (class.synset.as_str(), class.name.as_str())).collect();
        let wanted =
            [("golden retriever", ""), ("border collie", "a dog"), ("金毛 犬", "dog"), ("n1", "dog, domestic dog")];
        assert_eq!(pairs, wanted);
        assert!(parse_synsets("# none\n").is_err());
        let described =
            parse_synsets("LabelName,DisplayName\n/m/011k07,Tortoise\n/m/011q46kg,\"Container, box\"\n").expect("two");
        let pairs: Vec<(&str, &str)> =
            described.iter().map(|class| (class.synset.as_str(), class.name.as_str())).collect();
        assert_eq!(pairs, [("/m/011k07", "Tortoise"), ("/m/011q46kg", "Container, box")]);
    }

    #[test]
    fn sources_that_cannot_be_meant_are_refused_before_anything_starts() {
        assert_eq!(Source::parse("-").expect("standard input"), Source::Stdin);
        assert!(Source::parse("/no/such/file").is_err() && Source::parse("/").is_err());
        let classes = parse_synsets("--synsets", "n1").expect("one");
        assert!(Source::template("http://x/?wnid={synset}", &classes).is_ok());
        assert!(Source::template("http://x/", &classes).is_err() && Source::template("http://{synset}", &[]).is_err());
    }

    /// Serves `bodies` one connection each, as HTTP/1.1 with the lengths given, and returns the address.
    async fn serve(bodies: &'static [(&'static str, usize)]) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(async move {
            for (body, length) in bodies {
                let (mut stream, _) = listener.accept().await.expect("a connection");
                let _ = stream.read(&mut [0; 4096]).await;
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
                stream.write_all(format!("{head}{body}").as_bytes()).await.expect("sent");
            }
        });
        format!("http://{address}")
    }

    async fn sent(source: &Source) -> (Result<()>, String) {
        let (pieces, mut received) = mpsc::channel(1000);
        let result = source.send(&pieces).await;
        drop(pieces);
        let mut text = String::new();
        while let Some(piece) = received.recv().await {
            match piece.and_then(|request| request.part) {
                Some(Part::Data(data)) => text.push_str(std::str::from_utf8(&data).expect("text")),
                Some(Part::Source(source)) => text.push_str(&format!("[{}]", source.name)),
                _ => {}
            }
        }
        (result, text)
    }

    #[tokio::test]
    async fn lists_come_over_http_and_one_that_is_cut_is_an_error() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let address = serve(&[("n1\thttp://a/\n", 13), ("n1\thttp://a/\n", 99)]).await;
        let source = Source::parse(&format!("{address}/lists/urls.txt?x=1")).expect("an address");
        let (result, text) = sent(&source).await;
        assert!(result.is_ok() && text == "[urls.txt]n1\thttp://a/\n", "{result:?} {text}");
        assert!(sent(&source).await.0.is_err());
    }

    #[tokio::test]
    async fn a_template_is_asked_for_each_synset_and_its_lines_are_labelled() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let address = serve(&[("http://a/1\r\n\r\nhttp://a/2", 24)]).await;
        let classes = parse_synsets("--synsets", "n1 one").expect("one");
        let source = Source::template(&format!("{address}/?wnid={{synset}}"), &classes).expect("a template");
        let (result, text) = sent(&source).await;
        assert!(result.is_ok() && text.ends_with("]n1\thttp://a/1\nn1\thttp://a/2\n"), "{result:?} {text}");
    }

    #[tokio::test]
    async fn a_stream_of_requests_ends_only_where_its_end_is_marked() {
        let (pieces, received) = mpsc::channel(2);
        pieces.send(Some(CreateDatasetRequest::default())).await.expect("room");
        drop(pieces);
        let requests = requests(received);
        let all = tokio::time::timeout(Duration::from_millis(50), requests.collect::<Vec<_>>()).await;
        assert!(all.is_err(), "a list that broke off was taken for a whole one");
        let (pieces, received) = mpsc::channel(2);
        pieces.send(None).await.expect("room");
        assert!(super::requests(received).collect::<Vec<_>>().await.is_empty());
    }
}
