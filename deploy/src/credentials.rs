//! What a process shows of itself to the coordinator: the token that a file holds, and its session.
//!
//! A file of a token is read for each call, so that one that is replaced is used from the next call on.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Result;
use coordinator::{NewToken, Role};
use proto::dial::{Credentials, Dial};
use proto::session::Session;
use tonic::Status;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tracing::warn;

use crate::exit::Ended;
use crate::private;

/// Where a process has its token from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    /// Somebody named this file.
    Told(PathBuf),
    /// A `gleaner local` of the same user on this machine would have left it in one of these.
    Found(Vec<PathBuf>),
}

/// The way to a coordinator, on which every call carries the token of a file, and the process's session. Without a file
/// it is the token of a `gleaner local` that listens there, if there is one.
///
/// # Errors
/// If others could read the token on its way.
pub(crate) fn add(dial: Dial, token_file: Option<&Path>, session: Option<Session>) -> Result<Dial> {
    let source = match token_file {
        Some(file) if !dial.is_private() => {
            let file = file.display();
            return Err(Ended::usage(format!(
                "the token of {file} is not sent to {dial}: over plain http everybody on the way could read it; use https://, or \
                 leave out --token-file and GLEANER_TOKEN_FILE"
            )));
        }
        Some(file) => Source::Told(file.to_owned()),
        None if dial.is_loopback() => Source::Found(of_local(dial.port())),
        None => Source::Found(Vec::new()),
    };
    Ok(dial.with(Credentials::new(move |metadata| {
        if let Some(session) = &session {
            session.carry(metadata);
        }
        source.carry(metadata)
    })))
}

/// The token of a `gleaner local`, which whoever runs it finds by the port. Its files are removed when it is dropped.
pub(crate) struct LocalToken {
    /// Holds the token.
    pub(crate) file: PathBuf,
    /// Holds its line, for the coordinator.
    pub(crate) holders: PathBuf,
}

impl LocalToken {
    /// Makes one for a cluster whose coordinator listens at an address; none for other machines, which could not find
    /// it, nor where there is no folder to leave it in.
    ///
    /// # Errors
    /// If the system gives no random bits.
    pub(crate) fn make(listen: SocketAddr) -> Result<Option<Self>> {
        if !listen.ip().is_loopback() {
            return Ok(None);
        }
        let made = NewToken::make(Role::Admin, "local").map_err(anyhow::Error::msg)?;
        for file in of_local(listen.port()) {
            match Self::leave(&file, &made) {
                Ok(token) => return Ok(Some(token)),
                Err(error) => warn!(file = %file.display(), %error, "cannot leave the cluster's token here"),
            }
        }
        warn!(
            "there is no folder for the cluster's token (XDG_RUNTIME_DIR, HOME): whoever is on this machine commands the cluster"
        );
        Ok(None)
    }

    fn leave(file: &Path, made: &NewToken) -> std::io::Result<Self> {
        private::make_folder(file.parent().unwrap_or(file))?;
        let token = Self { file: file.to_owned(), holders: file.with_extension("holders") };
        private::replace(&token.holders, &format!("{}\n", made.line))?;
        private::replace(&token.file, &format!("{}\n", made.token))?;
        Ok(token)
    }
}

impl Drop for LocalToken {
    fn drop(&mut self) {
        for file in [&self.file, &self.holders] {
            if let Err(error) = std::fs::remove_file(file) {
                warn!(file = %file.display(), %error, "cannot remove the cluster's token; it is good for nothing any more");
            }
        }
    }
}

/// The files in which a `gleaner local` that listens at this port leaves its token.
fn of_local(port: u16) -> Vec<PathBuf> {
    private::run_folders().into_iter().map(|folder| folder.join(port.to_string())).collect()
}

impl Source {
    #[allow(clippy::result_large_err, reason = "as interceptors return it")]
    fn carry(&self, metadata: &mut MetadataMap) -> Result<(), Status> {
        let text = match self {
            Self::Told(file) => Some(std::fs::read_to_string(file).map_err(|error| {
                let file = file.display();
                Status::unauthenticated(format!("the token of --token-file {file} cannot be read: {error}"))
            })?),
            Self::Found(files) => files.iter().find_map(|file| std::fs::read_to_string(file).ok()),
        };
        let Some(text) = text else { return Ok(()) };
        let token = text.trim();
        let value = MetadataValue::<Ascii>::try_from(format!("Bearer {token}"));
        let value = value.ok().filter(|_| !token.is_empty() && !token.contains(char::is_whitespace));
        let mut value = value.ok_or_else(|| {
            let file = match self {
                Self::Told(file) => file.display().to_string(),
                Self::Found(_) => "left by `gleaner local`".to_owned(),
            };
            Status::unauthenticated(format!(
                "the token file {file} must hold one token, as `gleaner token new` prints it"
            ))
        })?;
        value.set_sensitive(true);
        metadata.insert("authorization", value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carried(source: &Source) -> Result<Option<String>, Status> {
        let mut metadata = MetadataMap::new();
        source.carry(&mut metadata)?;
        assert!(!format!("{metadata:?}").contains("gleaner_"), "it is shown nowhere: {metadata:?}");
        Ok(metadata.get("authorization").map(|value| value.to_str().expect("text").to_owned()))
    }

    #[test]
    fn a_token_is_read_for_each_call_and_one_that_was_named_must_be_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("token");
        let told = Source::Told(file.clone());
        let missing = carried(&told).expect_err("not there");
        assert!(missing.message().contains(&file.display().to_string()), "{missing}");
        for (text, expected) in [("gleaner_1\n", "Bearer gleaner_1"), (" gleaner_2 ", "Bearer gleaner_2")] {
            std::fs::write(&file, text).expect("written");
            assert_eq!(carried(&told).expect("a token").as_deref(), Some(expected));
        }
        for wrong in ["", "\n", "gleaner_1\ngleaner_2", "gleaner_\u{e9}\u{0}"] {
            std::fs::write(&file, wrong).expect("written");
            let refused = carried(&told).expect_err(wrong);
            assert!(refused.message().contains("one token") && !refused.message().contains("gleaner_"), "{refused}");
        }
        let found = Source::Found(vec![folder.path().join("none"), file.clone()]);
        std::fs::write(&file, "gleaner_3").expect("written");
        assert_eq!(carried(&found).expect("a token").as_deref(), Some("Bearer gleaner_3"));
        std::fs::remove_file(&file).expect("removed");
        assert_eq!(carried(&found).expect("none is fine"), None);
    }

    #[test]
    fn a_token_goes_over_plain_http_to_this_machine_alone() {
        let file = Path::new("/token");
        for own in ["http://127.0.0.1:7070", "http://localhost:7070", "http://[::1]:7070"] {
            assert!(super::add(Dial::new(own).expect("an address"), Some(file), None).is_ok(), "{own}");
        }
        for other in ["http://10.0.0.1:7070", "http://gleaner:7070", "http://127.0.0.1.example:7070"] {
            let refused = super::add(Dial::new(other).expect("an address"), Some(file), None).expect_err(other);
            assert!(refused.to_string().contains("https://"), "{refused}");
            assert!(super::add(Dial::new(other).expect("an address"), None, None).is_ok(), "{other}");
        }
    }
}
