//! How a process reaches the coordinator: the flags that every role and command has for it, and the [`contexts`] that
//! stand for them.

pub(crate) mod contexts;
mod secret;

use std::path::PathBuf;

use anyhow::{Context, Result};
use proto::dial::Dial;
use proto::session::Session;

use self::contexts::Contexts;
use crate::credentials;
use crate::exit::Ended;
use crate::tls::ClientTlsArgs;

/// Where commands look for the coordinator unless told otherwise.
const DEFAULT: &str = "http://127.0.0.1:7070";

/// The way to the coordinator.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct DialArgs {
    /// Where the coordinator listens: http://HOST:PORT, https://HOST:PORT over TLS, or HOST:PORT [default of commands:
    /// http://127.0.0.1:7070]
    #[arg(long, env = "GLEANER_COORDINATOR", value_name = "URL", value_parser = address)]
    coordinator: Option<String>,
    /// File that holds the token to show; read again for each call [default: that of a `gleaner local` on this machine]
    #[arg(long, env = "GLEANER_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Context that says all of that, unless it is told [default: the current one of `gleaner config`]
    #[arg(long, env = "GLEANER_CONTEXT", value_name = "NAME")]
    context: Option<String>,
    #[command(flatten)]
    tls: ClientTlsArgs,
}

impl DialArgs {
    /// The way of a command, which looks at this machine unless told otherwise.
    pub(crate) fn dial(&self) -> Result<Dial> {
        self.dial_as(None, &Contexts::load)
    }

    /// The way of a role, which must be told, for a process of this session.
    pub(crate) fn dial_as_told(&self, session: &Session) -> Result<Dial> {
        if self.coordinator.is_none() && self.context.is_none() {
            return Err(Ended::usage("where is the coordinator? --coordinator or GLEANER_COORDINATOR says it"));
        }
        self.dial_as(Some(session.clone()), &Contexts::load)
    }

    fn dial_as(&self, session: Option<Session>, contexts: &dyn Fn() -> Result<Contexts>) -> Result<Dial> {
        let Place { address, token_file, tls } = self.place(contexts)?;
        let dial = match address.starts_with("https://") {
            true => Dial::over_tls(&address, tls.open()?),
            false => Dial::new(&address),
        };
        let dial = dial.with_context(|| format!("--coordinator {address}"))?;
        credentials::add(dial, token_file.as_deref(), session)
    }

    /// Where the coordinator is and what to show there. What is told wins over the context, which is for its own
    /// coordinator alone: no other sees its token.
    fn place(&self, contexts: &dyn Fn() -> Result<Contexts>) -> Result<Place> {
        let context = match (&self.context, &self.coordinator) {
            (Some(name), _) => Some(contexts()?.named(name)?.clone()),
            (None, Some(_)) => None,
            (None, None) => contexts()?.current()?.cloned(),
        };
        let of_context = context.as_ref().map(|context| &context.coordinator);
        let address = self.coordinator.as_ref().or(of_context).map_or_else(|| DEFAULT.to_owned(), String::clone);
        let context = context.filter(|context| context.coordinator == address).unwrap_or_default();
        let tls = self.tls.clone().or(context.tls());
        Ok(Place { address, token_file: self.token_file.clone().or(context.token_file), tls })
    }
}

/// Where a coordinator is, and what it is shown.
struct Place {
    address: String,
    token_file: Option<PathBuf>,
    tls: ClientTlsArgs,
}

/// A coordinator's address with its scheme.
pub(crate) fn address(text: &str) -> Result<String, String> {
    let with_scheme = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    const FORMS: &str = "http://HOST:PORT, https://HOST:PORT or HOST:PORT";
    let url = url::Url::parse(&with_scheme).map_err(|e| format!("{e}; write {FORMS}"))?;
    match (url.scheme(), url.host_str()) {
        ("http" | "https", Some(_)) => Ok(with_scheme.trim_end_matches('/').to_owned()),
        _ => Err(format!("must be {FORMS}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_need_no_scheme_and_nothing_but_http_is_taken() {
        assert_eq!(address("https://gleaner:7070").as_deref(), Ok("https://gleaner:7070"));
        assert_eq!(address("127.0.0.1:7070").as_deref(), Ok("http://127.0.0.1:7070"));
        assert_eq!(address("http://gleaner:7070/").as_deref(), Ok("http://gleaner:7070"));
        assert!(address("ftp://x").is_err() && address("").is_err());
    }

    fn contexts() -> Result<Contexts> {
        Ok(toml::from_str(
            "current-context = 'lab'\n[contexts.lab]\ncoordinator = 'https://lab:7070'\ntoken-file = '/lab'\ntls-ca = '/ca'\n\
             [contexts.home]\ncoordinator = 'http://127.0.0.1:1'",
        )?)
    }

    #[test]
    fn what_is_told_wins_over_the_context_whose_token_no_other_coordinator_sees() {
        let place = |coordinator: Option<&str>, token: Option<&str>, context: Option<&str>| {
            let [coordinator, context] = [coordinator, context].map(|text| text.map(str::to_owned));
            let args = DialArgs { coordinator, token_file: token.map(PathBuf::from), context, ..DialArgs::default() };
            let place = args.place(&contexts)?;
            // Its authorities go the same way as its token.
            assert_eq!(place.tls.tls_ca.is_some(), place.address == "https://lab:7070");
            anyhow::Ok((place.address, place.token_file.map(|file| file.display().to_string())))
        };
        let is = |address: &str, token: Option<&str>| (address.to_owned(), token.map(str::to_owned));
        let lab = "https://lab:7070";
        assert_eq!(place(None, None, None).expect("current"), is(lab, Some("/lab")));
        assert_eq!(place(None, Some("/own"), None).expect("current"), is(lab, Some("/own")));
        assert_eq!(place(None, None, Some("home")).expect("named"), is("http://127.0.0.1:1", None));
        assert_eq!(place(Some("http://x:1"), None, None).expect("told"), is("http://x:1", None));
        assert_eq!(place(Some("http://x:1"), None, Some("lab")).expect("told"), is("http://x:1", None));
        assert_eq!(place(Some(lab), None, Some("lab")).expect("both"), is(lab, Some("/lab")));
        assert!(place(None, None, Some("none")).is_err());
        let none = DialArgs::default().place(&|| Ok(Contexts::default())).expect("this machine");
        assert_eq!((none.address.as_str(), none.token_file), (DEFAULT, None));
    }

    #[test]
    fn roles_must_be_told_where_the_coordinator_is() {
        let session = Session::new("word".to_owned());
        assert!(DialArgs::default().dial_as_told(&session).is_err());
        let told = DialArgs { coordinator: Some("http://gleaner:7070".to_owned()), ..DialArgs::default() };
        assert_eq!(told.dial_as_told(&session).expect("a way").to_string(), "http://gleaner:7070");
    }
}
