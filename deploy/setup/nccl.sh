#!/usr/bin/env bash
# Does the NCCL backend compile, link and start? Without a GPU nothing more can be asked of it.
# Only the room `torch` is built, as a package of its own from the trainer's files, because the whole trainer would have to be
# compiled once more: torch-sys is another one with another libtorch. Barely optimised: nothing here is slow.
set -euo pipefail
cd "$(dirname "$0")/../.."
[[ -e target/libtorch-cuda/full ]] || make libtorch CUDA=1 LINK_ONLY=1

package=target/nccl
rm -rf $package/src
mkdir -p $package/src
ln -s ../../../trainer/src/{torch,torch.rs} $package/src/
ln -sf ../../trainer/build/shim.rs $package/shim.rs
echo 'mod shim; fn main() { shim::compile() }' >$package/build.rs
cp Cargo.lock $package/
dependency() { grep -E "^($1) = " Cargo.toml; }
cat >$package/Cargo.toml <<TOML
[workspace]
[package]
name = "nccl"
version = "0.0.0"
edition = "2024"
build = "build.rs"
[features]
nccl = []
[dependencies]
$(dependency 'tch|torch-sys|thiserror')
[build-dependencies]
$(dependency cc)
TOML
echo '#![allow(unused)] pub mod torch;' >$package/src/lib.rs
LIBTORCH=$PWD/target/libtorch-cuda CARGO_TARGET_DIR=$package/target \
    cargo test --lib --features nccl --manifest-path $package/Cargo.toml -- --test-threads 1
