//! SeaweedFS, a server that speaks S3, checks signatures, and keeps to what each of its users may do.

#![allow(unreachable_pub, reason = "a module of a test binary")]

use std::net::{Ipv4Addr, TcpStream};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use support::{FreeAddress, PATIENCE};

use super::{printed, python};

/// A free port P with P + 10000, which SeaweedFS takes too.
fn with_grpc() -> [FreeAddress; 2] {
    loop {
        let http = FreeAddress::loopback();
        let grpc = http.port().checked_add(10_000).map(|port| FreeAddress::bind((Ipv4Addr::LOCALHOST, port).into()));
        if let Some(Ok(grpc)) = grpc {
            return [http, grpc];
        }
    }
}

/// SeaweedFS, which speaks S3 and checks signatures; ended when dropped.
pub struct SeaweedFs {
    child: Child,
    _dir: tempfile::TempDir,
    /// The port of S3.
    pub s3: u16,
    filer: u16,
}

impl SeaweedFs {
    /// Starts it; `identities` are who may do what, by key and secret.
    pub fn start(identities: &[(&str, &str, &[&str])]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let identity = |(key, secret, actions): &(&str, &str, &[&str])| json!({ "name": key, "credentials": [{ "accessKey": key, "secretKey": secret }], "actions": actions });
        let identities = json!({ "identities": identities.iter().map(identity).collect::<Vec<_>>() }).to_string();
        let config = dir.path().join("s3.json");
        std::fs::write(&config, identities).expect("a folder to write to");
        let reserved = [(); 4].map(|()| with_grpc());
        let [master, volume, filer, s3] = reserved.each_ref().map(|ports| ports[0].port());
        let child = python("weed")
            .args([
                "server",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                "-master.volumeSizeLimitMB=64",
                "-volume.max=20",
                "-s3",
            ])
            .arg(format!("-dir={}", dir.path().display()))
            .arg(format!("-s3.config={}", config.display()))
            .args([format!("-master.port={master}"), format!("-volume.port={volume}")])
            .args([format!("-filer.port={filer}"), format!("-s3.port={s3}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("weed starts");
        let server = Self { child, _dir: dir, s3, filer };
        let begun = Instant::now();
        while [s3, filer].iter().any(|&port| TcpStream::connect(("127.0.0.1", port)).is_err()) {
            assert!(begun.elapsed() < PATIENCE, "SeaweedFS does not come up");
            std::thread::sleep(Duration::from_millis(100));
        }
        server
    }

    /// A bucket is a folder of the filer.
    pub fn make_bucket(&self, name: &str) {
        let url = format!("http://127.0.0.1:{}/buckets/{name}/", self.filer);
        let script = "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], method='POST'), timeout=30)";
        printed(python("python").args(["-c", script, &url]));
    }
}

impl Drop for SeaweedFs {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
