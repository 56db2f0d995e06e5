//! Whether a body is the one that was listed, as far as the list says: what an expired domain serves now is another.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use md5::Md5;
use proto::columns::member;
use proto::dataset_spec::{ListedDigest, Verify};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// Whether the columns have a digest that is not the body's. One that is empty says nothing.
pub(crate) fn differs(verify: &Verify, columns: Option<&str>, body: &[u8]) -> bool {
    let columns: Option<Map<String, Value>> = columns.and_then(|columns| serde_json::from_str(columns).ok());
    let listed = columns.as_ref().and_then(|columns| columns.get(&member(&verify.column))?.as_str()).map(str::trim);
    let Some(listed) = listed.filter(|listed| !listed.is_empty()) else { return false };
    match verify.digest {
        ListedDigest::Sha256 => !hex::encode(Sha256::digest(body)).eq_ignore_ascii_case(listed),
        ListedDigest::Md5Base64 => STANDARD.encode(Md5::digest(body)) != listed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_compared_with_what_its_row_says_and_with_nothing_else() {
        let sha256 = Verify { digest: ListedDigest::Sha256, column: "sha256".to_owned() };
        let md5 = Verify { digest: ListedDigest::Md5Base64, column: "OriginalMD5".to_owned() };
        // RFC 1321 and FIPS 180-2 have these of "abc".
        let row = r#"{"list_sha256":"BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD",
            "OriginalMD5":"kAFQmDzST7DWlj99KOF/cg=="}"#;
        for verify in [&sha256, &md5] {
            assert!(!differs(verify, Some(row), b"abc") && differs(verify, Some(row), b"abd"), "{verify:?}");
            for none in [None, Some("{}"), Some(r#"{"list_sha256":"","OriginalMD5":" "}"#)] {
                assert!(!differs(verify, none, b"abc"), "{none:?}");
            }
        }
    }
}
