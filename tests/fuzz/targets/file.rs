//! What imports read: Parquet files of which only pieces are here, and the addresses of pictures in files.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    worker::fuzz_parquet(data);
    if let Ok(text) = std::str::from_utf8(data) {
        let Some(url) = proto::files::parse(text) else { return };
        let again = url.to_string();
        assert_eq!(proto::files::parse(&again).as_ref(), Some(&url), "{again}");
    }
});
