//! URLs that lately gave a picture to some worker. To one to which many hosts in a row seem dead, those of *others* say
//! whether the world is dead or its own way out. Pure.

use std::collections::VecDeque;

use proto::outcomes::LONGEST_URL;

/// Those that are remembered, of as many hosts.
const MOST: usize = 64;
/// Those that one worker is told.
const TOLD: usize = 4;

#[derive(Debug)]
struct Probe {
    worker: String,
    url: String,
}

/// The latest ones, the newest last.
#[derive(Debug, Default)]
pub(crate) struct Probes(VecDeque<Probe>);

/// Host and port; none if this is nothing to ask.
fn host(url: &str) -> Option<&str> {
    let (scheme, rest) = url.split_once("://")?;
    let host = rest.split(['/', '?', '#']).next().filter(|host| !host.is_empty());
    host.filter(|_| matches!(scheme, "http" | "https") && url.len() <= LONGEST_URL)
}

impl Probes {
    /// These gave pictures to this worker just now.
    pub(crate) fn heard(&mut self, worker: &str, urls: Vec<String>) {
        for url in urls.into_iter().take(TOLD) {
            let Some(of) = host(&url) else { continue };
            // Of one worker and host the newest is enough.
            self.0.retain(|probe| probe.worker != worker || host(&probe.url) != Some(of));
            self.0.push_back(Probe { worker: worker.to_owned(), url });
        }
        // A worker alone must not push out what others have told.
        while self.0.len() > MOST {
            let from_it = self.0.iter().filter(|probe| probe.worker == worker).count();
            let at = self.0.iter().position(|probe| from_it <= MOST / 2 || probe.worker == worker);
            self.0.remove(at.unwrap_or(0));
        }
    }

    /// Some that gave pictures to others, the newest first, of different hosts.
    pub(crate) fn of_others(&self, worker: &str) -> Vec<String> {
        let mut told: Vec<String> = Vec::new();
        for probe in self.0.iter().rev().filter(|probe| probe.worker != worker) {
            if told.len() < TOLD && !told.iter().any(|url| host(url) == host(&probe.url)) {
                told.push(probe.url.clone());
            }
        }
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_told_what_gave_pictures_to_others_the_newest_of_each_host() {
        let mut probes = Probes::default();
        let heard = |probes: &mut Probes, worker: &str, urls: &[&str]| {
            probes.heard(worker, urls.iter().map(|&url| url.to_owned()).collect());
        };
        heard(&mut probes, "w1", &["http://a/1", "ftp://x/1", "http:///1", "http://b:81/1"]);
        heard(&mut probes, "w2", &["http://a/2", "https://c?q"]);
        heard(&mut probes, "w1", &["http://a/3"]);
        assert_eq!(probes.of_others("w2"), ["http://a/3", "http://b:81/1"]);
        assert_eq!(probes.of_others("w1"), ["https://c?q", "http://a/2"]);
        assert_eq!(probes.of_others("new").len(), 3);
        for n in 0..1000 {
            heard(&mut probes, "w1", &[&format!("http://{n}/")]);
        }
        assert_eq!(probes.of_others("w1"), ["https://c?q", "http://a/2"], "w1 alone pushes nobody out");
        assert!(probes.0.len() <= MOST);
        for n in 0..1000 {
            heard(&mut probes, &format!("w{n}"), &[&format!("http://{n}/")]);
        }
        assert_eq!(probes.of_others("w1")[0], "http://999/");
    }
}
