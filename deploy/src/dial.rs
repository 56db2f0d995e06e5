//! How a process reaches the coordinator: the flags that every role and command has for it.

use anyhow::{Context, Result};
use proto::dial::Dial;

use crate::exit::Ended;

/// Where commands look for the coordinator unless told otherwise.
const DEFAULT: &str = "http://127.0.0.1:7070";

/// The way to the coordinator.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct DialArgs {
    /// Where the coordinator listens: http://HOST:PORT or HOST:PORT [default of commands: http://127.0.0.1:7070]
    #[arg(long, env = "GLEANER_COORDINATOR", value_name = "URL", value_parser = address)]
    coordinator: Option<String>,
}

impl DialArgs {
    /// The way of a command, which looks at this machine unless told otherwise.
    pub(crate) fn dial(&self) -> Result<Dial> {
        let address = self.coordinator.as_deref().unwrap_or(DEFAULT);
        Dial::new(address).with_context(|| format!("--coordinator {address}"))
    }

    /// The way of a role, which must be told.
    pub(crate) fn dial_as_told(&self) -> Result<Dial> {
        match self.coordinator {
            Some(_) => self.dial(),
            None => Err(Ended::usage("where is the coordinator? --coordinator or GLEANER_COORDINATOR says it")),
        }
    }
}

/// A coordinator's address with its scheme.
fn address(text: &str) -> Result<String, String> {
    let with_scheme = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let url = url::Url::parse(&with_scheme).map_err(|e| format!("{e}; write http://HOST:PORT or HOST:PORT"))?;
    match (url.scheme(), url.host_str()) {
        ("http", Some(_)) => Ok(with_scheme.trim_end_matches('/').to_owned()),
        _ => Err("must be http://HOST:PORT or HOST:PORT".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_need_no_scheme_and_nothing_but_http_is_taken() {
        assert_eq!(address("127.0.0.1:7070").as_deref(), Ok("http://127.0.0.1:7070"));
        assert_eq!(address("http://gleaner:7070/").as_deref(), Ok("http://gleaner:7070"));
        assert!(address("ftp://x").is_err() && address("").is_err());
    }

    #[test]
    fn commands_look_at_this_machine_and_roles_must_be_told() {
        assert_eq!(DialArgs::default().dial().expect("a way").to_string(), DEFAULT);
        assert!(DialArgs::default().dial_as_told().is_err());
        let told = DialArgs { coordinator: Some("http://gleaner:7070".to_owned()) };
        assert_eq!(told.dial_as_told().expect("a way").to_string(), "http://gleaner:7070");
    }
}
