//! Files put together by hand. Those of PyTorch itself are read in tests/interop.rs.

use super::*;

/// A zip file as PyTorch writes it.
fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut list) = (Vec::new(), Vec::new());
    for (name, bytes) in entries {
        let local = file.len() as u32;
        let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32IsoHdlc, bytes) as u32;
        let length = bytes.len() as u32;
        let fixed = [&[0; 6][..], &crc.to_le_bytes(), &length.to_le_bytes(), &length.to_le_bytes()].concat();
        let name_length = (name.len() as u16).to_le_bytes();
        // Between an entry's name and its bytes is room, so that they begin at a multiple of 64.
        file.extend(
            [&b"PK\x03\x04\0\0\0\0"[..], &fixed, &name_length, &[3, 0], name.as_bytes(), b"FB\0", bytes].concat(),
        );
        list.extend([&b"PK\x01\x02\0\0\0\0\0\0"[..], &fixed, &name_length, &[0; 12], &local.to_le_bytes()].concat());
        list.extend(name.as_bytes());
    }
    let at = file.len() as u32;
    let count = (entries.len() as u16).to_le_bytes();
    let length = (list.len() as u32).to_le_bytes();
    file.extend([&list, &b"PK\x05\x06\0\0\0\0"[..], &count, &count, &length, &at.to_le_bytes(), &[0, 0]].concat());
    file
}

/// A file of one storage, "0", of the numbers 0 to 5.
fn saved(pickle: &[u8]) -> Vec<u8> {
    let numbers: Vec<u8> = (0..6).flat_map(|number| (number as f32).to_le_bytes()).collect();
    zip(&[("a/data.pkl", pickle), ("a/byteorder", b"little"), ("a/data/0", &numbers)])
}

/// A tensor on the stack, if there is none before it.
fn tensor(offset: u8, shape: [u8; 2], strides: [u8; 2]) -> Vec<u8> {
    let pair = |[first, second]: [u8; 2]| [b'K', first, b'K', second, 0x86];
    let storage = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nU\x010U\x03cpuK\x06tQ";
    [&storage[..], &[b'K', offset], &pair(shape), &pair(strides), b"\x89ccollections\nOrderedDict\n)RtR"].concat()
}

/// A pickle of a dict with these tensors.
fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut pickle = b"\x80\x02ccollections\nOrderedDict\n)Rq\x00(".to_vec();
    for (name, tensor) in entries {
        pickle.extend([&[b'U', name.len() as u8], name.as_bytes(), tensor].concat());
    }
    [&pickle[..], b"u}U\x09_metadataNsb."].concat()
}

/// The head of what comes out, and its numbers.
fn converted(file: &[u8]) -> (serde_json::Value, Vec<f32>) {
    let Converted { safetensors, .. } = convert(file).expect("a sound file");
    let (length, rest) = safetensors.split_first_chunk().expect("a length");
    let (head, numbers) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let numbers = numbers.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    (serde_json::from_slice(head).expect("JSON"), numbers)
}

fn refusal(file: &[u8]) -> String {
    convert(file).expect_err("it is no state dict").to_string()
}

#[test]
fn tensors_are_copied_as_their_strides_say() {
    let pickle = dict(&[
        ("b.weight", tensor(0, [2, 3], [3, 1])),
        ("features.module.0.weight", tensor(0, [3, 2], [1, 3])),
        ("a.bias", tensor(4, [1, 2], [9, 1])),
    ]);
    let (head, numbers) = converted(&saved(&pickle));
    assert_eq!(head["a.bias"], json!({"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}));
    assert_eq!(head["features.0.weight"]["data_offsets"], json!([32, 56]));
    assert_eq!(numbers, [&[4.0, 5.0][..], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], &[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]].concat());
}

#[test]
fn a_checkpoint_has_its_state_dict_within_it() {
    let inner = dict(&[("w", tensor(0, [2, 3], [3, 1]))]);
    let inner = &inner[2..inner.len() - 1];
    let checkpoint =
        [b"\x80\x02}(U\x04bestG?\xf0\0\0\0\0\0\0U\x05stepsK\x07U\x02lr]K\x01aU\x0astate_dict", inner, b"u."].concat();
    assert_eq!(converted(&saved(&checkpoint)).1.len(), 6);
}

#[test]
fn what_no_state_dict_needs_is_refused_by_its_name() {
    for (pickle, said) in [
        (&b"\x80\x02cposix\nsystem\nU\x02idq\0\x85R."[..], "\"posix.system\""),
        (b"\x80\x02cbuiltins\neval\n.", "\"builtins.eval\""),
        (b"\x80\x02ctorchvision.models.alexnet\nAlexNet\n)\x81.", "was a whole network saved?"),
        (b"\x80\x02)\x81.", "0x81"),
        (b"\x80\x04\x95\0\0\0\0\0\0\0\0.", "pickle_protocol 4"),
        (b"\x80\x02}.", "no state dict"),
        (b"\x80\x02K\x01.", "single tensor"),
        (b"\x80\x02K\x01", "does not end"),
        (b"\x80\x02R.", "not put together"),
        (b"\x80\x02h\x07.", "not put together"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "not put together"),
    ] {
        let refusal = refusal(&saved(pickle));
        assert!(refusal.contains(said), "{said}: {refusal}");
    }
    assert!(refusal(b"GIF89a").contains("no file by torch.save"));
    assert!(refusal(&zip(&[("a/picture", b"")])).contains("none by torch.save"));
    assert!(refusal(&zip(&[("a/data.pkl", b"."), ("a/code/x.py", b"")])).contains("TorchScript"));
    let big = [("a/data.pkl", &b"\x80\x02}."[..]), ("a/byteorder", b"big")];
    assert!(refusal(&zip(&big)).contains("highest byte"));
}

#[test]
fn a_tensor_stays_within_its_storage_and_the_file_within_its_size() {
    for (shape, strides, offset, said) in [
        ([2, 3], [3, 1], 1, "beyond the end"),
        ([2, 3], [255, 1], 0, "beyond the end"),
        ([1, 7], [7, 1], 0, "beyond the end"),
        ([255, 255], [0, 0], 0, "larger than its file"),
    ] {
        let refusal = refusal(&saved(&dict(&[("w", tensor(offset, shape, strides))])));
        assert!(refusal.contains(said) && refusal.contains("\"w\""), "{said}: {refusal}");
    }
    assert!(converted(&saved(&dict(&[("w", tensor(9, [0, 255], [0, 0]))]))).1.is_empty());
    let many: Vec<(String, Vec<u8>)> = (0..90).map(|number| (number.to_string(), tensor(0, [20, 2], [0, 0]))).collect();
    let many: Vec<(&str, Vec<u8>)> = many.iter().map(|(name, tensor)| (&**name, tensor.clone())).collect();
    assert!(convert(&saved(&dict(&many))).is_ok(), "tensors may share a storage");
}

#[test]
fn deep_and_long_pickles_need_little_stack_and_memory() {
    let deep = [&b"\x80\x02)"[..], &vec![0x85; 3 << 20], b"."].concat();
    assert!(refusal(&saved(&deep)).contains("single tensor"));
    let long = [&b"\x80\x02"[..], &vec![b'N'; 5 << 20], b"."].concat();
    assert!(refusal(&saved(&long)).contains("longer than 4 MiB"));
}

#[test]
fn a_damaged_file_is_an_error() {
    let sound = saved(&dict(&[("w", tensor(0, [2, 3], [3, 1]))]));
    assert!(convert(&sound).is_ok());
    for length in 0..sound.len() {
        assert!(convert(&sound[..length]).is_err(), "{length} bytes of it");
    }
    let storage = sound.windows(4).position(|bytes| bytes == 5_f32.to_le_bytes()).expect("the last number");
    for (place, bit) in (0..sound.len()).flat_map(|place| (0..8).map(move |bit| (place, bit))) {
        let mut damaged = sound.clone();
        damaged[place] ^= 1 << bit;
        let read = convert(&damaged);
        assert!(place < storage - 20 || place > storage + 3 || read.is_err(), "a number was changed");
    }
}
