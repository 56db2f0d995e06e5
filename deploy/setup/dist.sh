#!/usr/bin/env bash
# The small binary (everything but the trainer) for any Linux with glibc 2.17 or newer, as an archive and as a Python wheel, in target/dist:
#
#   dist.sh [x86_64] [aarch64]
#
# maturin builds the wheel with zig as C compiler and linker, which knows the old glibc's symbols; the archive's binary comes out of it.
set -euo pipefail
cd "$(dirname "$0")/../.."
tools=target/tools/dist
out=target/dist
version=$(awk -F'"' '/^version = / { print $2; exit }' Cargo.toml)

if ! cmp -s deploy/setup/dist.txt "$tools/ready"; then
    rm -rf "$tools"
    deploy/setup/venv.sh "$tools"
    "$tools/bin/python" -m pip --disable-pip-version-check install --quiet --require-hashes --no-deps \
        --only-binary=:all: -r deploy/setup/dist.txt
    cp deploy/setup/dist.txt "$tools/ready"
fi
PATH=$PWD/$tools/bin:$PATH
mkdir -p "$out"

for arch in ${@:-x86_64 aarch64}; do
    target=$arch-unknown-linux-gnu
    rustup target add "$target"
    rm -f "$out/gleaner_cluster-$version"-*"_$arch".*.whl
    CARGO_PROFILE_RELEASE_STRIP=true maturin build --locked --release --zig --compatibility manylinux2014 --target "$target" \
        --manifest-path deploy/Cargo.toml --out "$out" --quiet
    # Its name has both names of that glibc, in the order that the builder likes.
    wheel=$(find "$out" -name "gleaner_cluster-$version-py3-none-*_$arch.*.whl")
    name=gleaner-$version-linux-$arch
    rm -rf "${out:?}/$name"
    mkdir "$out/$name"
    "$tools/bin/python" -m zipfile -e "$wheel" "$out/$name/wheel"
    install -m 755 "$out/$name/wheel/gleaner_cluster-$version.data/scripts/gleaner" "$out/$name/gleaner"
    rm -r "$out/$name/wheel"
    cp README.md LICENSE "$out/$name/"
    tar --create --xz --sort=name --owner=0 --group=0 --mtime=@0 --file "$out/$name.tar.xz" --directory "$out" "$name"

    newest=$(readelf --version-info "$out/$name/gleaner" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -1)
    [[ $arch != "$(uname -m)" ]] || "$out/$name/gleaner" --version
    ls -l "$wheel" "$out/$name.tar.xz" | awk '{ print $5, $9 }'
    echo "$arch: wants nothing newer than ${newest:-?}; $(stat -c %s "$out/$name/gleaner") bytes"
done
