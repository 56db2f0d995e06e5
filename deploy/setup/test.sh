#!/usr/bin/env bash
# `make test`: every stage in turn, the first that fails ends it, and a table of their times either way.
set -euo pipefail
cd "$(dirname "$0")/../.."

table=()
summary() {
    local status=$?
    printf '\n%-10s %8s\n' stage seconds
    printf '%-10s %8d\n' ${table[@]+"${table[@]}"}
    if ((status)); then echo "make test: FAILED in stage '$current'"; else echo "make test: passed"; fi
}
trap summary EXIT

# stage NAME COMMAND...
stage() {
    current=$1
    local start=$SECONDS status=0
    echo "== $current: ${*:2}"
    "${@:2}" || status=$?
    table+=("$current" "$((SECONDS - start))")
    return "$status"
}

# Only if a doc comment opens a block of Rust: rustdoc takes its time to find out that there is none.
doctests() {
    # shellcheck disable=SC2016 # the backquotes are Markdown's
    local fences='/^ *\/\/[\/!] *```/ { if (!open && /```(rust|no_run|should_panic|compile_fail)?[, ]*$/) found = 1; open = !open }
                  END { exit !found }'
    if find . -path ./target -prune -o -name '*.rs' -exec cat {} + | awk "$fences"; then
        cargo test --locked --doc --workspace
    else
        echo "no doc tests"
    fi
}

# `make fuzz` has a lock file of its own, which has to know what the crates need by now.
fuzz_lock() { cargo metadata --locked --format-version 1 --manifest-path tests/fuzz/Cargo.toml >/dev/null; }

profile=default
[[ -z ${CI:-} ]] || profile=ci

stage fmt cargo fmt --all --check
stage layers target/tools/venv/bin/python tests/layers.py
stage k8s target/tools/venv/bin/python tests/k8s/check.py
stage engine deploy/setup/engine.sh check
stage deny cargo deny --locked --log-level error check --hide-inclusion-graph licenses bans sources
stage fuzz-lock fuzz_lock
stage clippy cargo clippy --locked --workspace --all-targets --features gleaner-trainer/bench -- -D warnings
stage slim cargo clippy --locked -p gleaner --no-default-features -- -D warnings
stage build cargo nextest run --locked --workspace --no-run
stage tests cargo nextest run --locked --workspace --profile "$profile"
stage doctests doctests
[[ -z ${CI:-} ]] || stage nccl deploy/setup/nccl.sh
[[ -z ${CI:-} ]] || stage image env PROFILE=dev deploy/images.sh gleaner
