//! How lists are written.

use proto::pb::ListFormat;

/// How a list is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ListForm {
    /// By the first line and the file's name
    Auto,
    /// `n01440764<TAB>http://...`
    SynsetUrl,
    /// `n01440764_10026<TAB>http://...`
    WnidIdUrl,
    /// With a header line
    Csv,
    /// With a header line
    Tsv,
    /// A JSON object a line
    Jsonl,
    /// Parquet
    Parquet,
}

impl From<ListForm> for ListFormat {
    fn from(form: ListForm) -> Self {
        match form {
            ListForm::Auto => Self::Auto,
            ListForm::SynsetUrl => Self::SynsetUrl,
            ListForm::WnidIdUrl => Self::WnidIdUrl,
            ListForm::Csv => Self::Csv,
            ListForm::Tsv => Self::Tsv,
            ListForm::Jsonl => Self::Jsonl,
            ListForm::Parquet => Self::Parquet,
        }
    }
}
