//! A cluster of real processes over a store in a temporary folder.
//!
//! ```text
//! test -> gleaner (command line) -> coordinator <- workers, agent -> ranks
//!                                        \___________ store ___________/
//!                                    workers -> origin (in the test's own process)
//! ```

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::address::FreeAddress;
use crate::process;

/// How long any one thing may take before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The `gleaner` binary that cargo has built beside this test or bench.
///
/// # Panics
/// If it is not there: only tests and benches of the package `gleaner` have it built.
pub fn binary() -> PathBuf {
    // target/PROFILE/deps/TEST
    let test = std::env::current_exe().expect("a test is a file");
    let binary = test.ancestors().nth(2).expect("it lies in cargo's target folder").join("gleaner");
    assert!(binary.exists(), "{} is missing: cargo build -p gleaner", binary.display());
    binary
}

/// Processes over one store; all are killed when it is dropped.
pub struct Cluster {
    dir: tempfile::TempDir,
    address: FreeAddress,
    store: String,
    binary: PathBuf,
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

    /// Nothing is started yet. `store`: another one than a folder, with the environment that opens it.
    pub fn new(store: Option<&str>, env: Vec<(String, String)>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let store = store.map_or_else(|| dir.path().join("store").display().to_string(), str::to_owned);
        let address = FreeAddress::loopback();
        Self { dir, address, store, binary: binary(), env, processes: Vec::new() }
    }

    /// Nothing is started yet; the coordinator will listen at a free port of this address.
    pub fn listening_at(host: &str) -> Self {
        let mut cluster = Self::new(None, Vec::new());
        cluster.address = FreeAddress::at(host);
        cluster
    }

    /// Nothing is started yet; the cluster's folder is made in this one, which is on a disk.
    pub fn within(folder: &Path) -> Self {
        let mut cluster = Self::new(None, Vec::new());
        cluster.dir = tempfile::tempdir_in(folder).expect("a folder to write to");
        cluster.store = cluster.path("store").display().to_string();
        cluster
    }

    /// Sets a variable of the environment for whatever is started from now on.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.env.push((name.to_owned(), value.to_owned()));
    }

    /// The store as `--store` names it: a folder, unless another one was given.
    pub fn store(&self) -> &str {
        &self.store
    }

    /// Where the coordinator listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A file of this name in the cluster's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file into the cluster's folder; its path.
    pub fn write(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).expect("the temporary folder is writable");
        path.display().to_string()
    }

    /// Starts a coordinator and waits until it answers.
    pub fn start_coordinator(&mut self) {
        self.start_coordinator_with(&[]);
    }

    /// The same with more flags. Leases are short, so that a killed worker's shard is soon free.
    pub fn start_coordinator_with(&mut self, flags: &[&str]) {
        let address = self.address.to_string();
        let always = ["coordinator", "--listen", &address];
        self.spawn("coordinator", &[&always, flags].concat());
        self.eventually("the coordinator answers", |cluster| {
            // To ask for a connection costs less than a process, and is refused until the store was read.
            std::net::TcpStream::connect(cluster.address()).is_ok() && cluster.try_gleaner(&["status"]).status.success()
        });
    }

    /// Starts a fetch worker that may reach loopback.
    pub fn start_worker(&mut self, name: &str) {
        self.start_worker_with(name, &[]);
    }

    /// The same with more flags.
    pub fn start_worker_with(&mut self, name: &str, flags: &[&str]) {
        self.spawn(name, &[&["worker", "--allow-net", "127.0.0.0/8"], flags].concat());
    }

    /// Starts a trainer agent with so many devices, all of them the CPU.
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
        let log = std::fs::File::options().create(true).append(true).open(self.log_file(name)).expect("a log file");
        // `ip netns exec` becomes the program, so that the child's process id is the program's.
        let mut command = match namespace {
            None => Command::new(&self.binary),
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace]).arg(&self.binary);
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

    fn configure(&self, command: &mut Command) {
        command
            .env("GLEANER_STORE", &self.store)
            .env("GLEANER_COORDINATOR", format!("http://{}", self.address))
            .env("GLEANER_LEASE_SECONDS", "3")
            .envs(self.env.iter().cloned())
            .stdin(Stdio::null());
    }

    /// The process id of a role.
    ///
    /// # Panics
    /// If it was not started.
    pub fn pid(&self, name: &str) -> u32 {
        self.processes.iter().find(|(of, _)| of == name).expect("it was started").1.id()
    }

    /// Whether a role that was started has not ended.
    pub fn is_alive(&self, name: &str) -> bool {
        process::parent(self.pid(name)).is_some()
    }

    fn remove(&mut self, name: &str) -> Child {
        let at = self.processes.iter().position(|(of, _)| of == name).expect("it was started");
        self.processes.remove(at).1
    }

    /// When, in seconds of the day, the last rank of a generation logged that it holds the agreed state; None while the
    /// store does not have that line.
    pub fn agreed(&self, run: &str, generation: u64) -> Option<f64> {
        let files = std::fs::read_dir(Path::new(&self.store).join(proto::keys::logs_of(run))).ok()?.flatten();
        let of_it =
            |file: &std::fs::DirEntry| file.file_name().to_string_lossy().starts_with(&format!("{generation:06}-"));
        let text: String = files.filter(of_it).filter_map(|file| std::fs::read_to_string(file.path()).ok()).collect();
        let agreed = text.lines().filter(|line| line.contains("agreed on a state"));
        agreed.filter_map(second_of_day).max_by(f64::total_cmp)
    }

    /// SIGTERM; how long it then took to end.
    ///
    /// # Panics
    /// If it does not end, or not well.
    pub fn terminate(&mut self, name: &str) -> Duration {
        let mut child = self.remove(name);
        let begun = Instant::now();
        process::signal(child.id(), "TERM");
        loop {
            if let Some(status) = child.try_wait().expect("our child") {
                assert!(status.success(), "{name}: {status}");
                return begun.elapsed();
            }
            if begun.elapsed() > PATIENCE {
                let _ = child.kill();
                panic!("{name} does not end");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// `kill -9`.
    pub fn kill(&mut self, name: &str) {
        let mut child = self.remove(name);
        child.kill().expect("it was running");
        child.wait().expect("it was our child");
    }

    fn log_file(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.log"))
    }

    /// What a role has logged so far.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.log_file(name)).unwrap_or_default()
    }

    /// Runs the command line, whatever comes out.
    pub fn try_gleaner(&self, args: &[&str]) -> Output {
        let mut command = Command::new(&self.binary);
        self.configure(&mut command);
        command.args(args).output().expect("the binary under test")
    }

    /// Runs the command line; what it printed.
    ///
    /// # Panics
    /// If it fails.
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

    /// Runs the command line with `-o json`.
    ///
    /// # Panics
    /// If it fails, or prints something else.
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.gleaner(&[args, &["-o", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("gleaner {args:?}: {e}: {text}"))
    }

    /// Waits until `done`: asks at once, soon again, and then less and less often, down to twice a second, since most
    /// questions are processes that take time from what is waited for.
    ///
    /// # Panics
    /// If that takes too long.
    pub fn eventually(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let begun = Instant::now();
        let mut pause = Duration::from_millis(50);
        while !done(self) {
            assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
            std::thread::sleep(pause);
            pause = (pause * 5 / 4).min(Duration::from_millis(500));
        }
    }

    /// Process ids of this cluster's rank processes.
    pub fn ranks(&self) -> Vec<u32> {
        let store = self.store.as_bytes();
        process::with_arguments(|args| args.get(1) == Some(&b"rank".as_slice()) && args.contains(&store))
    }
}

impl Drop for Cluster {
    #[expect(clippy::print_stdout, reason = "a failed test shows what its processes logged")]
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
///
/// # Panics
/// Before 1970.
#[allow(clippy::disallowed_methods, reason = "compared with times in logs")]
pub fn seconds_of_day() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    since.as_secs_f64().rem_euclid(86_400.0)
}
