//! Files by `torch.save`: their zip, their pickle, and how tensors see their storages. What PyTorch wrote before 1.6
//! has no checksum that would keep changes from the pickle's reader.
#![no_main]

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    drop(state_dict::convert(file));
});
