//! How a worker appears to the web: by which name, which way, and whose certificates it takes.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, ensure};
use url::Url;

/// What a worker is told about that when it starts.
#[derive(Debug, Clone, clap::Args)]
pub struct WebArgs {
    /// A page or mail address where site owners find out who fetches from them; part of the user agent.
    #[arg(long, env = "GLEANER_CONTACT", value_name = "URL", value_parser = parse_contact)]
    pub contact: Option<String>,

    /// What requests call themselves instead of Gleaner/VERSION, such as "Birds/1.0"; its first word is the name under
    /// which robots.txt may speak to this worker.
    #[arg(long, env = "GLEANER_USER_AGENT", value_name = "TEXT", value_parser = parse_user_agent)]
    pub user_agent: Option<String>,

    /// Reach the web through this proxy, http://[USER:PASSWORD@]HOST[:PORT] or https://...; it looks names up, and
    /// decides which addresses may be reached.
    #[arg(long, env = "GLEANER_PROXY", hide_env_values = true, value_name = "URL")]
    pub proxy: Option<Proxy>,

    /// Also trust the certificate authorities in this file (PEM), beside those that the system trusts; may be repeated.
    #[arg(long, env = "GLEANER_CA_FILE", value_delimiter = ',', value_name = "FILE")]
    pub ca_file: Vec<PathBuf>,

    /// Whose certificates are taken from web servers.
    #[arg(long, env = "GLEANER_WEB_TLS", value_enum, default_value_t = Certificates::Trusted, value_name = "WHOSE")]
    pub tls: Certificates,
}

/// Whose certificates are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Certificates {
    /// Those of authorities that are trusted, while they are valid, for the host that shows them
    Trusted,
    /// Anybody's: old sites let theirs run out. What comes may then be from whoever sits in between
    Any,
}

impl WebArgs {
    /// As which requests name themselves.
    pub(crate) fn user_agent(&self) -> String {
        let own = format!("Gleaner/{}", env!("CARGO_PKG_VERSION"));
        let name = self.user_agent.as_ref().unwrap_or(&own);
        match &self.contact {
            Some(contact) => format!("{name} (+{contact})"),
            None => name.clone(),
        }
    }

    /// The name by which sites may speak to this worker alone.
    pub(crate) fn agent(&self) -> String {
        self.user_agent().chars().take_while(|c| is_of_name(*c)).collect()
    }

    /// Whom else to trust.
    pub(crate) fn authorities(&self) -> anyhow::Result<Vec<reqwest::Certificate>> {
        let mut all = Vec::new();
        for file in &self.ca_file {
            let bad = || format!("--ca-file {}", file.display());
            let pem = std::fs::read(file).with_context(bad)?;
            let found = reqwest::Certificate::from_pem_bundle(&pem).with_context(bad)?;
            ensure!(!found.is_empty(), "{} holds no certificate: PEM is wanted", bad());
            all.extend(found);
        }
        Ok(all)
    }
}

/// What names of products consist of (RFC 9309, 2.2.1).
fn is_of_name(c: char) -> bool {
    c.is_ascii_alphabetic() || matches!(c, '-' | '_')
}

fn parse_contact(text: &str) -> Result<String, String> {
    match text.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '(' | ')')) && !text.is_empty() {
        true => Ok(text.to_owned()),
        false => Err("it goes into a header: printable ASCII without spaces and parentheses is allowed".to_owned()),
    }
}

fn parse_user_agent(text: &str) -> Result<String, String> {
    let printable = text.chars().all(|c| c.is_ascii_graphic() || c == ' ') && text.trim() == text;
    match printable && text.starts_with(is_of_name) {
        true => Ok(text.to_owned()),
        false => Err("it goes into a header, and begins with a name: printable ASCII, and first a letter".to_owned()),
    }
}

/// A proxy's address, which may hold a password: it is not shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy(pub(crate) Url);

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proxy({}://{})", self.0.scheme(), self.0.host_str().unwrap_or_default())
    }
}

impl FromStr for Proxy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let url = Url::parse(text).ok().filter(|url| url.has_host());
        let url = url.filter(|url| matches!(url.scheme(), "http" | "https") && matches!(url.path(), "" | "/"));
        url.map(Self).ok_or_else(|| "http://HOST:PORT or https://HOST:PORT is wanted".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Arguments {
        #[command(flatten)]
        web: WebArgs,
    }

    fn parse(flags: &[&str]) -> Result<WebArgs, clap::Error> {
        let arguments: Arguments = clap::Parser::try_parse_from([&["worker"], flags].concat())?;
        Ok(arguments.web)
    }

    #[test]
    fn a_worker_has_a_name_of_ones_own_by_which_sites_speak_to_it() {
        let own = parse(&[]).expect("nothing is needed");
        assert!(own.user_agent().starts_with("Gleaner/") && own.agent() == "Gleaner");
        let birds = ["--user-agent", "Bird-Watch/2.1 research", "--contact", "mail@birds.example"];
        let birds = parse(&birds).expect("a name and a contact");
        assert_eq!(birds.user_agent(), "Bird-Watch/2.1 research (+mail@birds.example)");
        assert_eq!(birds.agent(), "Bird-Watch");
        for wrong in ["", " Birds", "1Birds", "Birds\nX: y", "B\u{e4}rds"] {
            assert!(parse(&["--user-agent", wrong]).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_proxys_password_is_not_shown() {
        let args = parse(&["--proxy", "http://me:secret@proxy.example:3128"]).expect("a proxy");
        assert!(!format!("{args:?}").contains("secret"));
        for wrong in ["proxy.example:3128", "socks5://proxy.example", "http://proxy.example/path", "http://"] {
            assert!(parse(&["--proxy", wrong]).is_err(), "{wrong}");
        }
    }
}
