//! Files that break their format's rules, and whose pixels are all there.

use super::*;

/// A segment with this marker and body.
fn segment(marker: u8, body: &[u8]) -> Vec<u8> {
    [&[0xff, marker], &(body.len() as u16 + 2).to_be_bytes()[..], body].concat()
}

/// With more bytes before the first place where these are.
fn insert_before(bytes: &[u8], place: &[u8], more: &[u8]) -> Vec<u8> {
    let at = bytes.windows(place.len()).position(|window| window == place).expect("it is there");
    [&bytes[..at], more, &bytes[at..]].concat()
}

#[test]
fn a_jpeg_whose_pixels_are_all_there_is_kept_however_odd_the_rest_is() {
    let image = photo(200, 150);
    let plain = jpeg(&image);
    let reference = stored(&plain);
    let end = plain.len() - 2;
    let junk: Vec<u8> = (1..=120).collect();
    let replaced = |from: &[u8], to: &[u8]| {
        let at = plain.windows(from.len()).position(|window| window == from).expect("it is there");
        [&plain[..at], to, &plain[at + from.len()..]].concat()
    };
    let scan_of_one = replaced(&[0, 63, 0], &[0, 0, 0]);
    let adobe = [b"Adobe", &[0, 100, 0, 0, 0, 0, 7][..]].concat();
    let without_jfif = [&plain[..2], &plain[20..]].concat();
    for (what, bytes) in [
        ("bytes between segments", insert_before(&plain, &[0xff, 0xc4], &junk)),
        ("bytes before the end", [&plain[..end], &junk[..40], &plain[end..]].concat()),
        ("bytes after the end", [&plain[..], &junk].concat()),
        ("an unknown version of JFIF", replaced(b"JFIF\0\x01", b"JFIF\0\x09")),
        ("an unknown transform", insert_before(&without_jfif, &[0xff, 0xdb], &segment(0xee, &adobe))),
        ("a damaged profile", insert_before(&plain, &[0xff, 0xdb], &segment(0xe2, b"ICC_PROFILE\0\x05\x02 nothing"))),
        ("a scan of the first coefficient alone", scan_of_one.clone()),
        ("the same with a trailer", [&scan_of_one[..], b"SEFT"].concat()),
        ("several of these", insert_before(&[&scan_of_one[..], &junk].concat(), &[0xff, 0xc4], &junk)),
    ] {
        assert!(distance(&stored(&bytes), &reference) < 0.01, "{what}");
        // It is not stored as it came: who reads the shard need not be so patient.
        let resize = Resize { size: 150, mode: ResizeMode::KeepRatio, reencode: Reencode::Needed, ..Resize::default() };
        let rules = Rules { resize, ..rules() };
        let kept = Validator::new().expect("libjpeg-turbo").validate(&bytes, &rules).outcome.expect("kept");
        assert_eq!(kept.image == bytes, what == "bytes after the end", "{what}");
    }
    // The same oddities hide no damage.
    for bytes in [&plain, &insert_before(&plain, &[0xff, 0xc4], &junk), &scan_of_one] {
        let cut = &bytes[..bytes.len() * 2 / 3];
        assert_eq!(rejection(cut), Rejection::Truncated);
        assert_eq!(rejection(&[cut, &[0xff, 0xd9]].concat()), Rejection::Undecodable);
    }
}

#[test]
fn inks_are_taken_as_inverted_with_and_without_adobes_marker() {
    let image = photo(120, 90);
    let inks: Vec<u8> = image.pixels().flat_map(|p| [p[0], p[1], p[2], 255]).collect();
    let cmyk = jpeg_of(&inks, 120, 90, PixelFormat::CMYK, false);
    let at = cmyk.windows(2).position(|two| two == [0xff, 0xee]).expect("libjpeg-turbo writes it");
    let length = 2 + usize::from(u16::from_be_bytes([cmyk[at + 2], cmyk[at + 3]]));
    // Without the marker a transform of the inks is not known either, so this one has none.
    let mut without = cmyk.clone();
    without.drain(at..at + length);
    assert_eq!(cmyk[at + length - 1], 2, "YCCK");
    assert!(validate(&without).outcome.is_ok());
    let mut plain = cmyk;
    plain[at + length - 1] = 0;
    assert!(distance(&stored(&without), &stored(&plain)) < 0.01);
}

/// A PNG's chunks: kind and bytes, with their head and checksum.
fn chunks(png: &[u8]) -> Vec<(&[u8], &[u8])> {
    let (mut at, mut found) = (8, Vec::new());
    while at < png.len() {
        let length = u32::from_be_bytes(png[at..at + 4].try_into().expect("four")) as usize;
        found.push((&png[at + 4..at + 8], &png[at..at + 12 + length]));
        at += 12 + length;
    }
    found
}

#[test]
fn a_png_whose_pixels_are_all_there_is_kept_however_odd_the_rest_is() {
    let plain = encoded(photo(200, 150), ImageFormat::Png);
    let reference = stored(&plain);
    let end = plain.len() - 12;
    let idat = chunks(&plain).iter().find(|(kind, _)| kind == b"IDAT").expect("pixels").1.to_vec();
    let at = plain.windows(4).position(|four| four == b"IDAT").expect("pixels") - 4;
    let chunk =
        |kind: &[u8; 4], body: &[u8], crc: [u8; 4]| [&(body.len() as u32).to_be_bytes()[..], kind, body, &crc].concat();
    let before_pixels = |more: &[u8]| [&plain[..at], more, &plain[at..]].concat();
    for (what, bytes) in [
        ("no end", plain[..end].to_vec()),
        ("half an end", plain[..end + 6].to_vec()),
        ("no checksum behind the pixels", plain[..end - 4].to_vec()),
        ("no checksum within the last chunk either", plain[..end - 8].to_vec()),
        ("another end", [&plain[..end], b"\0\0\0\0IEND\0\0\0\0"].concat()),
        ("text in the place of the end", [&plain[..end], b"<br /><b>Warning</b>: in line 7"].concat()),
        ("bytes after the end", [&plain[..], b"\0\0\0"].concat()),
        ("a damaged profile", before_pixels(&chunk(b"iCCP", b"x\0\0nothing", [0; 4]))),
        ("a damaged text", before_pixels(&chunk(b"tEXt", b"", [1; 4]))),
        ("a size in metres twice", before_pixels(&chunk(b"pHYs", &[7; 9], [2; 4]).repeat(2))),
    ] {
        assert!(distance(&stored(&bytes), &reference) < 0.01, "{what}");
    }
    // The same oddities hide no damage.
    for lost in [100, idat.len() / 2] {
        let cut = &plain[..at + 8 + idat.len() - lost];
        assert_eq!(rejection(cut), Rejection::Truncated, "{lost} bytes are lost");
        assert_eq!(rejection(&[cut, b"\0\0\0\0IEND\xae\x42\x60\x82"].concat()), Rejection::Truncated, "{lost}");
    }
    let mut damaged = plain[..end].to_vec();
    damaged[at + 8 + idat.len() / 2] ^= 0x55;
    assert_eq!(rejection(&damaged), Rejection::Undecodable);
}

#[test]
fn a_gif_is_shown_on_a_canvas_that_holds_its_first_frame() {
    let plain = encoded(photo(150, 100), ImageFormat::Gif);
    let reference = stored(&plain);
    for canvas in [[0, 0, 0, 0], [150, 0, 0, 0], [20, 0, 100, 0], [0, 0, 100, 0]] {
        let mut odd = plain.clone();
        odd[6..10].copy_from_slice(&canvas);
        assert!(distance(&stored(&odd), &reference) < 0.01, "{canvas:?}");
        assert_eq!(validate(&odd).size, Some((150, 100)), "{canvas:?}");
    }
    let mut larger = plain.clone();
    larger[6..10].copy_from_slice(&[200, 0, 100, 0]);
    assert_eq!(validate(&larger).size, Some((200, 100)), "a frame may leave some of its canvas free");
    for length in 0..plain.len().min(900) {
        let _ = validate(&plain[..length]);
    }
}
