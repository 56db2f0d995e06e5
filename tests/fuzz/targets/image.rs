//! Bodies, from their first byte to the stored sample. The first byte chooses how it is stored.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some((&choice, body)) = data.split_first() {
        worker::fuzz_image(choice, body);
    }
});
