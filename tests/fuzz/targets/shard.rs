//! What is read back from the store: blocks of tars, indexes, manifests, outcomes. The first byte chooses.
#![no_main]

use bytes::Bytes;
use proto::outcomes::OutcomeRow;
use proto::shard::read_block;
use proto::{ShardIndex, Stored, table};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((&kind, rest)) = data.split_first() else { return };
    match kind % 5 {
        0 => drop(read_block(&Bytes::copy_from_slice(rest))),
        1 => {
            if let Ok(index) = ShardIndex::from_json(rest) {
                let again = ShardIndex::from_json(&index.to_json()).expect("what is written can be read");
                assert_eq!(again.to_json(), index.to_json());
            }
        }
        2 => drop(proto::Manifest::from_json(rest)),
        3 => drop(table::read::<OutcomeRow>(Bytes::copy_from_slice(rest))),
        _ => {
            if let Ok(Ok(spec)) = std::str::from_utf8(rest).map(proto::DatasetSpec::from_json) {
                proto::DatasetSpec::from_json(&spec.to_json()).expect("what is written can be read");
            }
        }
    }
});
