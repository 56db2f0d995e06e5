//! URL lists, in every format and compression. The first byte chooses the format.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some((&format, list)) = data.split_first() {
        coordinator::fuzz_list(format, list);
    }
});
