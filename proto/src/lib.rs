//! The contracts of Gleaner: all that two roles must agree on. No I/O but the way to the coordinator, and no runtime.
//!
//! - [`pb`]: the gRPC services, generated from `proto/gleaner/v1/*.proto`, which are their specification; [`keda`]: the
//!   one that KEDA asks;
//! - [`ids`], [`keys`]: names of what lasts, and the keys of its objects, built and parsed here alone;
//! - [`site`]: what has a budget; [`files`]: addresses of pictures that are there already;
//! - [`dataset_spec`], [`run_spec`]: what people ask for;
//! - [`columns`]: what of a list travels with its pictures;
//! - [`format`], [`table`]: what stored objects have in common: numbered JSON documents, and rows as Parquet;
//!   [`caught`]: libraries that panic where what they read is damaged;
//! - [`cluster`], [`term`], [`handover`]: which cluster a process belongs to, the begin of a coordinator's time in
//!   office, and what it leaves to the next one;
//! - [`round`], [`slice`], [`control`], [`tombstone`]: the parts of a dataset's catalog, the URLs of one shard, what is
//!   decided about a dataset later, and its end;
//! - [`opt_out`]: what owners may say against the use of their pictures;
//! - [`rejection`], [`outcome_counts`], [`outcomes`]: what became of each URL;
//! - [`shard`], [`index`]: tars and their blocks, and the object that commits them;
//! - [`manifest`], [`findings`], [`gist`]: an immutable version of a dataset, what was found out when it was made, and
//!   what the next version need not read again;
//! - [`stored_run`], [`run_event`], [`run_ledger`], [`metric`]: what a run is, its history, what it was trained on, and
//!   its learning curve;
//! - [`dial`], [`session`]: how the coordinator is reached, and who may speak under a process's name;
//! - [`trace`]: which span of another process a piece of work belongs to.

pub mod caught;
pub mod cluster;
pub mod columns;
pub mod control;
pub mod dataset_spec;
pub mod dial;
pub mod files;
pub mod findings;
pub mod format;
pub mod gist;
pub mod handover;
pub mod ids;
pub mod index;
pub mod keys;
pub mod manifest;
pub mod metric;
pub mod opt_out;
pub mod outcome_counts;
pub mod outcomes;
pub mod rejection;
pub mod round;
pub mod run_event;
pub mod run_ledger;
pub mod run_spec;
pub mod session;
pub mod shard;
pub mod site;
pub mod slice;
pub mod stored_run;
pub mod table;
pub mod term;
pub mod tombstone;
pub mod trace;
pub mod weights;

pub use dataset_spec::{
    Chroma, Class, Color, DatasetSpec, Duplicates, Filter, ImageFormat, Limits, MultiLabel, Reencode, Resize,
    ResizeMode, SpecError, Split, Splits,
};
pub use format::{FormatError, Stored, StoredOnce};
pub use ids::{Attempt, DatasetId, RunName, ShardId, Synset};
pub use index::ShardIndex;
pub use manifest::Manifest;
pub use opt_out::Signal;
pub use outcome_counts::OutcomeCounts;
pub use rejection::{Outcome, Rejection};
pub use run_spec::{RunSpec, network};
pub use shard::Sample;

/// Messages, clients and servers generated from the .proto files, and their descriptors.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated; the .proto files hold the comments")]
pub mod pb {
    tonic::include_proto!("gleaner.v1");

    /// The encoded `FileDescriptorSet`, for gRPC reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}

/// KEDA's contract with what it asks how many replicas there should be, generated from `externalscaler.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated; the .proto file holds the comments")]
pub mod keda {
    tonic::include_proto!("externalscaler");
}

/// The part of ONNX's messages that a convolutional network needs, generated from `onnx.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated; the .proto file says where it is from")]
pub mod onnx {
    tonic::include_proto!("onnx");
}

/// A [`pb::FailureKind`] by its name, as the command line prints it.
fn serialize_kind<S: serde::Serializer>(kind: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    let name = pb::FailureKind::try_from(*kind).unwrap_or_default().as_str_name();
    serializer.serialize_str(&name.trim_start_matches("FAILURE_KIND_").to_lowercase())
}
