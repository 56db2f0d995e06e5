//! Compiles the .proto files with protox, so that no protoc is needed, into tonic's clients and servers and a
//! descriptor set for gRPC reflection.

use std::path::PathBuf;

use prost_types::FileDescriptorSet;

const FILES: [&str; 5] = [
    "gleaner/v1/dataset.proto",
    "gleaner/v1/fetch.proto",
    "gleaner/v1/run.proto",
    "gleaner/v1/trainer.proto",
    "externalscaler/externalscaler.proto",
];

/// Messages that the command line also prints as JSON.
const PRINTED: [&str; 17] = [
    "AgentStatus",
    "ClassCount",
    "CompareRunsResponse",
    "CreateDatasetResponse",
    "DamagedShard",
    "Dataset",
    "DeviceStatus",
    "LargeSite",
    "LedgerLine",
    "ListRow",
    "LogLine",
    "Metric",
    "Run",
    "SlowestSite",
    "Status",
    "Trouble",
    "WorkerStatus",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors: FileDescriptorSet = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    let mut config = tonic_prost_build::configure();
    for message in PRINTED {
        config = config.message_attribute(format!(".gleaner.v1.{message}"), "#[derive(serde::Serialize)]");
    }
    config
        .field_attribute(".gleaner.v1.Metric.device", "#[serde(skip_serializing_if = \"Option::is_none\")]")
        .field_attribute(".gleaner.v1.Trouble.kind", "#[serde(serialize_with = \"crate::serialize_kind\")]")
        // The roles bring the transport; this crate stays free of it.
        .build_transport(false)
        .bytes(".")
        .compile_fds(descriptors)?;
    // No part of what is served, and so not among the descriptors.
    tonic_prost_build::configure().compile_fds(protox::compile(["onnx.proto"], ["proto"])?)?;
    Ok(())
}
