//! `gleaner config`: contexts. Each says by one name where a cluster's coordinator is and what is shown to it; the
//! current one is that of commands which are not told another. They lie in `~/.config/gleaner/config.toml`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::secret::{self, Files, ImportArgs};
use crate::exit::{Ended, Exit};
use crate::output::{Format, Table, note, say_json};
use crate::tls::ClientTlsArgs;
use crate::{dial, private};

/// `gleaner config ...`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make a context, or change what is told of one
    SetContext(SetArgs),
    /// Make a context of what a Secret of Kubernetes holds, by kubectl
    ImportKubernetes(ImportArgs),
    /// Let commands go to this context's cluster from now on
    UseContext {
        /// Which one
        name: String,
    },
    /// Show all contexts
    GetContexts {
        /// How to answer
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Forget a context; its files stay
    DeleteContext {
        /// Which one
        name: String,
    },
}

/// Arguments of `gleaner config set-context`.
#[derive(Debug, clap::Args)]
pub(crate) struct SetArgs {
    /// The context's name
    name: String,
    /// Where its coordinator listens: https://HOST:PORT, or on this machine http://HOST:PORT
    #[arg(long, value_name = "URL", value_parser = dial::address)]
    coordinator: Option<String>,
    /// File that holds the token to show there
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Authorities to trust there (PEM)
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// The certificate to show there (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The key of that certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

/// All contexts.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Contexts {
    #[serde(skip_serializing_if = "Option::is_none")]
    current_context: Option<String>,
    #[serde(default)]
    contexts: BTreeMap<String, Context>,
}

/// One cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Context {
    /// Its coordinator's address.
    pub(crate) coordinator: String,
    /// The file of the token that is shown there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_ca: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_cert: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_key: Option<PathBuf>,
}

impl Context {
    /// Which authorities are trusted there, and which certificate is shown.
    pub(crate) fn tls(&self) -> ClientTlsArgs {
        let Self { tls_ca, tls_cert, tls_key, .. } = self.clone();
        ClientTlsArgs { tls_ca, tls_cert, tls_key }
    }
}

/// Does it.
pub(crate) fn run(command: Command) -> Result<()> {
    let file = file()?;
    let mut contexts = Contexts::read(&file)?;
    match command {
        Command::SetContext(args) => {
            let name = args.name.clone();
            contexts.set(args)?;
            contexts.write(&file)?;
            note(format!("context {name} is set; `gleaner config use-context {name}` makes it the current one"));
        }
        Command::ImportKubernetes(args) => {
            let Files { token, ca, cert, key } = secret::import(&args, file.parent().unwrap_or(&file))?;
            let ImportArgs { name, coordinator, .. } = args;
            // What an earlier Secret said is not kept.
            contexts.contexts.remove(&name);
            let set = SetArgs {
                name: name.clone(),
                coordinator: Some(coordinator),
                token_file: token,
                tls_ca: ca,
                tls_cert: cert,
                tls_key: key,
            };
            contexts.set(set)?;
            contexts.write(&file)?;
            note(format!("context {name} is set; `gleaner config use-context {name}` makes it the current one"));
        }
        Command::UseContext { name } => {
            contexts.named(&name)?;
            contexts.current_context = Some(name);
            contexts.write(&file)?;
        }
        Command::GetContexts { output: Format::Json } => say_json(&contexts)?,
        Command::GetContexts { output: Format::Table } => contexts.table().say(),
        Command::DeleteContext { name } => {
            contexts.named(&name)?;
            contexts.contexts.remove(&name);
            contexts.current_context = contexts.current_context.filter(|current| *current != name);
            contexts.write(&file)?;
        }
    }
    Ok(())
}

fn file() -> Result<PathBuf> {
    let folder = private::config_folder();
    let folder =
        folder.ok_or_else(|| Ended::usage("there is no folder for settings: HOME and XDG_CONFIG_HOME are not set"))?;
    Ok(folder.join("config.toml"))
}

impl Contexts {
    /// The user's.
    ///
    /// # Errors
    /// If they cannot be read; there may be none.
    pub(crate) fn load() -> Result<Self> {
        file().map_or_else(|_| Ok(Self::default()), |file| Self::read(&file))
    }

    fn read(file: &Path) -> Result<Self> {
        let name = file.display();
        match std::fs::read_to_string(file) {
            Ok(text) => toml::from_str(&text).map_err(|error| Ended::usage(format!("{name}: {error}"))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("cannot read {name}")),
        }
    }

    fn write(&self, file: &Path) -> Result<()> {
        let written = private::make_folder(file.parent().unwrap_or(file))
            .and_then(|()| private::replace(file, &toml::to_string(self).map_err(std::io::Error::other)?));
        written.with_context(|| format!("cannot write {}", file.display()))
    }

    /// The context of that name.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn named(&self, name: &str) -> Result<&Context> {
        self.contexts.get(name).ok_or_else(|| {
            let names: Vec<&str> = self.contexts.keys().map(String::as_str).collect();
            let names = if names.is_empty() { "there are none".to_owned() } else { format!("there are {}", names.join(", ")) };
            Ended::error(
                Exit::NotFound,
                format!("there is no context {name:?}, {names}; `gleaner config set-context {name} --coordinator URL` makes it"),
            )
        })
    }

    /// The current one, if any.
    ///
    /// # Errors
    /// If it is none any more.
    pub(crate) fn current(&self) -> Result<Option<&Context>> {
        self.current_context.as_deref().map(|name| self.named(name)).transpose()
    }

    /// Whether commands go to one that is not told.
    pub(crate) fn has_current(&self) -> bool {
        self.current_context.is_some()
    }

    /// Makes a context, or changes what is told of one.
    fn set(&mut self, args: SetArgs) -> Result<()> {
        let SetArgs { name, coordinator, .. } = args;
        let mut context = match (self.contexts.get(&name), coordinator) {
            (Some(context), None) => context.clone(),
            (Some(context), Some(coordinator)) => Context { coordinator, ..context.clone() },
            (None, Some(coordinator)) => Context { coordinator, ..Context::default() },
            (None, None) => {
                let text = format!("context {name} is new: where does its coordinator listen? --coordinator says it");
                return Err(Ended::usage(text));
            }
        };
        let Context { token_file, tls_ca, tls_cert, tls_key, .. } = &mut context;
        let told =
            [(args.token_file, token_file), (args.tls_ca, tls_ca), (args.tls_cert, tls_cert), (args.tls_key, tls_key)];
        for (file, of_context) in told.into_iter().filter_map(|(file, of_context)| Some((file?, of_context))) {
            // Commands are given in any folder.
            let absolute = std::path::absolute(&file).with_context(|| file.display().to_string())?;
            *of_context = Some(absolute);
        }
        self.contexts.insert(name, context);
        Ok(())
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&["current", "name", "coordinator", "token file"]);
        for (name, Context { coordinator, token_file, .. }) in &self.contexts {
            let current = if self.current_context.as_ref() == Some(name) { "*" } else { "" };
            let token_file = token_file.as_ref().map(|file| file.display().to_string()).unwrap_or_default();
            table.row(vec![current.to_owned(), name.clone(), coordinator.clone(), token_file]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn set(name: &str, coordinator: Option<&str>, token_file: Option<&str>) -> SetArgs {
        let (coordinator, token_file) = (coordinator.map(str::to_owned), token_file.map(PathBuf::from));
        SetArgs { name: name.to_owned(), coordinator, token_file, tls_ca: None, tls_cert: None, tls_key: None }
    }

    #[test]
    fn contexts_are_set_changed_and_kept_where_nobody_else_reads_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("gleaner/config.toml");
        let mut contexts = Contexts::read(&file).expect("none yet");
        assert!(contexts.set(set("lab", None, None)).is_err(), "where is it?");
        contexts.set(set("lab", Some("https://lab:7070"), None)).expect("set");
        contexts.set(set("lab", None, Some("/lab.token"))).expect("changed");
        contexts.set(SetArgs { tls_ca: Some("/ca.pem".into()), ..set("lab", None, None) }).expect("changed");
        contexts.set(set("home", Some("http://127.0.0.1:7070"), Some("home.token"))).expect("set");
        contexts.current_context = Some("lab".to_owned());
        contexts.write(&file).expect("written");
        assert_eq!(std::fs::metadata(&file).expect("there").permissions().mode() & 0o777, 0o600);
        let read = Contexts::read(&file).expect("read");
        assert_eq!(read, contexts);
        let lab = read.current().expect("there").expect("one is current");
        assert_eq!(
            (lab.coordinator.as_str(), lab.token_file.as_deref()),
            ("https://lab:7070", Some("/lab.token".as_ref()))
        );
        assert_eq!(lab.tls().tls_ca.as_deref(), Some("/ca.pem".as_ref()));
        let home = read.named("home").expect("there");
        assert!(home.token_file.as_ref().is_some_and(|file| file.is_absolute() && file.ends_with("home.token")));
        let missing = read.named("hom").expect_err("none").to_string();
        assert!(missing.contains("home, lab") && missing.contains("set-context hom"), "{missing}");
        std::fs::write(&file, "current-contxt = 'lab'").expect("written");
        let broken = Contexts::read(&file).expect_err("a typo").to_string();
        assert!(broken.contains("config.toml") && broken.contains("current-contxt"), "{broken}");
    }
}
