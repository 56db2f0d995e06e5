//! What decides who may come in: tokens, names of callers, certificates, methods. The first byte chooses.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some((&what, bytes)) = data.split_first() {
        coordinator::fuzz_door(what, bytes);
    }
});
