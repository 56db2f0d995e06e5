#!/usr/bin/env bash
# The network's code for a browser: `engine.sh` builds it into deploy/src/try_it/, `engine.sh check` fails if it was built of something else.
set -euo pipefail
cd "$(dirname "$0")/../.."
to=deploy/src/try_it

# What it is built of, as one digest.
sources() {
    {
        cat deploy/classifier/Cargo.toml deploy/classifier/src/*.rs deploy/setup/engine.sh
        grep -E -A1 '^name = "(rten(-.*)?|fast_image_resize)"' Cargo.lock
    } | sha256sum | cut -d' ' -f1
}

if [[ ${1:-} == check ]]; then
    [[ $(sources) == "$(cat "$to/engine.built-of")" ]] || { echo "engine.wasm.gz is older than its sources: make engine" >&2; exit 1; }
    exit
fi
rustup target add wasm32-unknown-unknown
export CARGO_TARGET_DIR=target/engine RUSTFLAGS=-Ctarget-feature=+simd128 CARGO_PROFILE_RELEASE_LTO=fat \
    CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1 CARGO_PROFILE_RELEASE_PANIC=abort CARGO_PROFILE_RELEASE_STRIP=true
cargo rustc --locked -p gleaner-classifier --lib --crate-type cdylib --target wasm32-unknown-unknown --release
gzip -9nc "$CARGO_TARGET_DIR/wasm32-unknown-unknown/release/gleaner_classifier.wasm" >"$to/engine.wasm.gz"
sources >"$to/engine.built-of"
ls -l "$to/engine.wasm.gz"
