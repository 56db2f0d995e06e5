use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A web server with every kind of answer, by path.
pub(crate) async fn origin() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    address
}

async fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        request.push(stream.read_u8().await?);
        // The first byte of a TLS handshake, which a plain server cannot read.
        if request == [0x16] {
            return stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").await;
        }
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let path = request.split(' ').nth(1).unwrap_or("/");
    let with = |head: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {head}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        [head.as_bytes(), body].concat()
    };
    let answer = match path.trim_start_matches('/').split_once('/').unwrap_or((&path[1..], "")) {
        ("good", seed) => with("200 OK", &picture(seed.parse().unwrap_or(0))),
        ("moved", seed) => with(&format!("301 Moved\r\nLocation: /good/{seed}"), b""),
        ("loop", _) => with("302 Found\r\nLocation: /loop", b""),
        ("hops", n) => {
            let next = n.parse::<u32>().unwrap_or(0) + 1;
            with(&format!("302 Found\r\nLocation: /hops/{next}"), b"")
        }
        ("once", seed) => {
            static BROKEN_OFF: Mutex<Vec<String>> = Mutex::new(Vec::new());
            let whole = with("200 OK", &picture(seed.parse().unwrap_or(0)));
            let mut broken_off = BROKEN_OFF.lock().expect("nothing panics");
            let again = broken_off.iter().any(|before| before == path);
            broken_off.push(path.to_owned());
            if again { whole } else { whole[..whole.len() / 2].to_vec() }
        }
        // Heads as they should not be, but are.
        ("folded", seed) => with("200 OK\r\nX-Fold: one\r\n two\r\n\tthree", &picture(seed.parse().unwrap_or(0))),
        ("lines", _) => with("200 OK\r\nno header at all\r\nX-Blank : x\r\n: nameless", &picture(80)),
        ("headers", _) => {
            let more: String = (0..300).map(|n| format!("\r\nX-H{n}: {n}")).collect();
            with(&format!("200 OK{more}"), &picture(81))
        }
        ("latin1", _) => [&b"HTTP/1.1 302 Found\r\nConnection: close\r\nLocation: /\xe9t\xe9\r\n\r\n"[..]].concat(),
        ("%E9t%E9", _) => with("200 OK", &picture(82)),
        ("part", "whole") => with("206 Partial\r\nContent-Range: bytes 0-9/10", &picture(83)),
        ("part", _) => with("206 Partial\r\nContent-Range: bytes 0-9/11", &picture(84)),
        ("private", _) => with("302 Found\r\nLocation: http://10.0.0.1/x.jpg", b""),
        ("metadata", _) => with("302 Found\r\nLocation: http://169.254.169.254/latest", b""),
        ("long", _) => with(&format!("302 Found\r\nLocation: /good/{}", "7".repeat(9000)), b""),
        ("file", _) => with("302 Found\r\nLocation: file:///etc/passwd", b""),
        ("gone", _) => with("410 Gone", b"gone"),
        ("missing", _) => with("404 Not Found", b"missing"),
        ("later", _) => with("429 Too Many\r\nRetry-After: 3600", b""),
        ("sick", _) => with("500 Oops", b""),
        ("broken", _) => with("503 Unavailable\r\nRetry-After: 60", b""),
        ("html", _) => with("200 OK\r\nContent-Type: image/jpeg", &b"<html>no picture here</html>".repeat(300)),
        ("noai", _) => with("200 OK\r\nX-Robots-Tag: noai", &picture(1)),
        ("others", _) => with("200 OK\r\nX-Robots-Tag: otherbot: noindex, noai", &picture(2)),
        ("small", _) => with("200 OK", &picture(3)[..900]),
        ("cut", _) => with("200 OK", &picture(4)[..6_000]),
        // A length that is too large: of a picture that is whole, and of one that is not.
        (name @ ("short" | "shorter"), _) => {
            let lost = if name == "short" { 0 } else { 100 };
            let (head, picture) = ("Content-Length: 90000\r\nConnection: close\r\n\r\n", picture(5));
            [b"HTTP/1.1 200 OK\r\n", head.as_bytes(), &picture[..picture.len() - lost]].concat()
        }
        ("huge", _) => b"HTTP/1.1 200 OK\r\nContent-Length: 300000000\r\n\r\n".to_vec(),
        (name @ ("endless" | "film"), _) => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").await?;
            if name == "endless" {
                stream.write_all(&picture(6)).await?;
            }
            while stream.write_all(&[7; 65536]).await.is_ok() {}
            return Ok(());
        }
        ("late", _) => {
            tokio::time::sleep(Duration::from_millis(700)).await;
            with("302 Found\r\nLocation: /silent", b"")
        }
        ("heads", _) => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nX-More: ").await?;
            while stream.write_all(&[b'x'; 65536]).await.is_ok() {}
            return Ok(());
        }
        ("many", _) => {
            stream.write_all(b"HTTP/1.1 200 OK\r\n").await?;
            while stream.write_all(b"X-More: x\r\n").await.is_ok() {}
            return Ok(());
        }
        (name @ ("bomb" | "packed"), _) => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            if name == "bomb" {
                std::io::Write::write_all(&mut gzip, &picture(7))?;
            }
            std::io::Write::write_all(&mut gzip, &vec![0; 50 << 20])?;
            with("200 OK\r\nContent-Encoding: gzip", &gzip.finish()?)
        }
        ("drip", _) => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n").await?;
            while stream.write_all(b"x").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            return Ok(());
        }
        ("silent", _) => std::future::pending().await,
        ("garbage", _) => b"SSH-2.0-OpenSSH_9.2\r\n\r\n".to_vec(),
        ("robots.txt", _) => with("200 OK", b"User-agent: gleaner\nDisallow: /denied/\n"),
        (".well-known", _) => with("404 Not Found", b"missing"),
        _ => Vec::new(), // closes without a word
    };
    stream.write_all(&answer).await?;
    stream.shutdown().await
}

/// A JPEG of some 10 kB, different for every seed.
fn picture(seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    let pixels: Vec<u8> = (0..160 * 120 * 3)
        .map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((i / 480) as u8).wrapping_add((state >> 27) as u8)
        })
        .collect();
    let image = turbojpeg::Image {
        pixels: pixels.as_slice(),
        width: 160,
        pitch: 480,
        height: 120,
        format: turbojpeg::PixelFormat::RGB,
    };
    turbojpeg::compress(image, 92, turbojpeg::Subsamp::Sub2x2).expect("encodes").to_vec()
}
