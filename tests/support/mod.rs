//! A cluster of real processes over a store in a temporary folder, and the demo's web origin.
//!
//! ```text
//! test -> gleaner (command line) -> coordinator <- workers, agent -> ranks
//!                                        \___________ store ___________/
//!                                    workers -> origin (in the test's own process)
//! ```

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::print_stdout,
    reason = "shared by several test binaries, each of which uses a part"
)]

pub mod net;
pub mod training;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long any one thing may take before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(120);

const BINARY: &str = env!("CARGO_BIN_EXE_gleaner");

/// Processes over one store; all are killed when it is dropped.
pub struct Cluster {
    pub dir: tempfile::TempDir,
    pub address: String,
    pub store: String,
    env: Vec<(String, String)>,
    processes: Vec<(String, Child)>,
}

impl Cluster {
    /// A coordinator over a folder.
    pub fn start() -> Self {
        let mut cluster = Self::new(None, Vec::new());
        cluster.start_coordinator();
        cluster
    }

    /// Nothing is started yet; the coordinator will listen at a free port of this address.
    pub fn listening_at(host: &str) -> Self {
        let mut cluster = Self::new(None, Vec::new());
        let listener = std::net::TcpListener::bind((host, 0)).expect("an address of this machine");
        cluster.address = listener.local_addr().expect("bound").to_string();
        cluster
    }

    /// Nothing is started yet. `store`: another one than a folder, with the environment that opens it.
    pub fn new(store: Option<&str>, env: Vec<(String, String)>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let store = store.map_or_else(|| dir.path().join("store").display().to_string(), str::to_owned);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        Self { dir, address, store, env, processes: Vec::new() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).expect("the temporary folder is writable");
        path.display().to_string()
    }

    /// Short leases, so that a killed worker's shard is soon free.
    pub fn start_coordinator(&mut self) {
        self.start_coordinator_with(&[]);
    }

    pub fn start_coordinator_with(&mut self, flags: &[&str]) {
        let address = self.address.clone();
        let always = ["coordinator", "--listen", &address, "--lease-seconds", "3"];
        self.spawn("coordinator", &[&always, flags].concat());
        self.eventually("the coordinator answers", |cluster| cluster.try_gleaner(&["status"]).status.success());
    }

    pub fn start_worker(&mut self, name: &str) {
        self.spawn(name, &["worker", "--allow-net", "127.0.0.0/8"]);
    }

    pub fn start_trainer(&mut self, name: &str, devices: usize) {
        self.spawn(
            name,
            &["trainer", "--advertise-address", "127.0.0.1", "--devices", &vec!["cpu"; devices].join(",")],
        );
    }

    /// Starts a role.
    pub fn spawn(&mut self, name: &str, args: &[&str]) {
        self.spawn_in(None, name, args);
    }

    /// Starts a role in a network namespace.
    pub fn spawn_in(&mut self, namespace: Option<&str>, name: &str, args: &[&str]) {
        let log = std::fs::File::create(self.path(&format!("{name}.log"))).expect("a log file");
        // `ip netns exec` becomes the program, so that the child's process id is the program's.
        let mut command = match namespace {
            None => Command::new(BINARY),
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace, BINARY]);
                command
            }
        };
        self.configure(&mut command);
        let child = command
            .args(args)
            .args(["--exit-with-stdin"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the binary under test");
        self.processes.push((name.to_owned(), child));
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        self.configure(&mut command);
        command.args(args);
        command
    }

    fn configure(&self, command: &mut Command) {
        command
            .env("GLEANER_STORE", &self.store)
            .env("GLEANER_COORDINATOR", format!("http://{}", self.address))
            .envs(self.env.iter().cloned())
            .stdin(Stdio::null());
    }

    /// The process id of a role.
    pub fn pid(&self, name: &str) -> u32 {
        self.processes.iter().find(|(of, _)| of == name).expect("it was started").1.id()
    }

    /// Whether a role that was started has not ended.
    pub fn is_alive(&self, name: &str) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid(name))).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
    }

    /// When, in seconds of the day, the last rank of a generation said that it holds the agreed state, if the store has word of it.
    pub fn agreed(&self, run: &str, generation: u64) -> Option<f64> {
        let files = std::fs::read_dir(Path::new(&self.store).join(proto::keys::logs_of(run))).ok()?.flatten();
        let of_it =
            |file: &std::fs::DirEntry| file.file_name().to_string_lossy().starts_with(&format!("{generation:06}-"));
        let text: String = files.filter(of_it).filter_map(|file| std::fs::read_to_string(file.path()).ok()).collect();
        let said = text.lines().filter(|line| line.contains("agreed on a state"));
        said.filter_map(second_of_day).max_by(f64::total_cmp)
    }

    /// SIGTERM; how long it then took to end.
    pub fn terminate(&mut self, name: &str) -> Duration {
        let place = self.processes.iter().position(|(of, _)| of == name).expect("it was started");
        let (_, mut child) = self.processes.remove(place);
        let begun = Instant::now();
        let status = Command::new("kill").arg(child.id().to_string()).status().expect("kill(1)");
        assert!(status.success(), "kill {name}");
        while child.try_wait().expect("our child").is_none() {
            if begun.elapsed() > PATIENCE {
                let _ = child.kill();
                panic!("{name} does not end");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        begun.elapsed()
    }

    /// `kill -9`.
    pub fn kill(&mut self, name: &str) {
        let place = self.processes.iter().position(|(of, _)| of == name).expect("it was started");
        let (_, mut child) = self.processes.remove(place);
        child.kill().expect("it was running");
        child.wait().expect("it was our child");
    }

    pub fn is_running(&mut self, name: &str) -> bool {
        let (_, child) = self.processes.iter_mut().find(|(of, _)| of == name).expect("it was started");
        child.try_wait().expect("our child").is_none()
    }

    /// What a role has logged so far.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default()
    }

    /// Runs the command line, whatever comes out.
    pub fn try_gleaner(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the binary under test")
    }

    /// Runs the command line, which must succeed; what it printed.
    pub fn gleaner(&self, args: &[&str]) -> String {
        let output = self.try_gleaner(args);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "gleaner {args:?}: {}\n{}{}",
            output.status,
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.gleaner(&[args, &["-o", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("gleaner {args:?}: {e}: {text}"))
    }

    /// Waits until `done`, checking a few times a second.
    pub fn eventually(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Process ids of this cluster's rank processes.
    pub fn ranks(&self) -> Vec<u32> {
        let store = self.store.as_bytes();
        let is_rank = |pid: &u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let args: Vec<&[u8]> = line.split(|&b| b == 0).collect();
            args.get(1) == Some(&b"rank".as_slice()) && args.contains(&store)
        };
        let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
        pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_rank).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (name, _) in &self.processes {
                println!("--- {name}.log\n{}", self.log(name));
            }
        }
        for (_, child) in &mut self.processes {
            // It may have ended by itself, and then there is nothing left to do.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// `2026-11-24T11:17:41.123456Z ...` -> 11 h 17 min 41.123456 s in seconds.
fn second_of_day(line: &str) -> Option<f64> {
    let (_, time) = line.split_whitespace().next()?.trim_end_matches('Z').split_once('T')?;
    time.split(':').try_fold(0.0, |sum, part| Some(sum * 60.0 + part.parse::<f64>().ok()?))
}

/// The clock that logs show, in seconds of the day.
#[allow(clippy::disallowed_methods, reason = "compared with times in logs")]
pub fn seconds_of_day() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    since.as_secs_f64().rem_euclid(86_400.0)
}

/// The parent of a living process.
pub fn parent(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    if value("State:")?.starts_with('Z') { None } else { value("PPid:")?.parse().ok() }
}

/// Sends a signal by its name.
pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().expect("kill(1)");
    assert!(status.success(), "kill -{name} {pid}");
}

/// `kill -9` of any process.
pub fn kill(pid: u32) {
    signal(pid, "KILL");
}

/// An address on loopback whose port nobody has.
pub fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").to_string()
}

/// The repository's folder.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("deploy/ lies in the repository")
}
