#!/usr/bin/env bash
# Runs each fuzz target for so many seconds (default 60): deploy/setup/fuzz.sh [SECONDS] [TARGET...]
# Rust code is compiled with AddressSanitizer and the counters of libFuzzer, libjpeg-turbo with AddressSanitizer alone. What is
# found lies in target/fuzz/found/TARGET; the corpus grows in target/fuzz/corpus/TARGET.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-60}
shift || true
targets=("$@")
((${#targets[@]})) || targets=(list image shard door state_dict file)

# A sanitizer is an unstable flag of the compiler, of which the stable one has all parts.
export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="--cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
triple=$(rustc -vV | sed -n 's/^host: //p')
cargo build --locked --release --manifest-path tests/fuzz/Cargo.toml --target "$triple" --target-dir target/fuzz/build
python3 tests/fuzz/seeds.py target/fuzz/corpus

status=0
for target in "${targets[@]}"; do
    mkdir -p "target/fuzz/found/$target"
    log=target/fuzz/$target.log
    "target/fuzz/build/$triple/release/$target" "target/fuzz/corpus/$target" -max_total_time="$seconds" -timeout=20 \
        -rss_limit_mb=2048 -max_len=65536 -artifact_prefix="target/fuzz/found/$target/" -print_final_stats=1 >"$log" 2>&1 || status=1
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    found=$(find "target/fuzz/found/$target" -type f | wc -l)
    echo "fuzz: target=$target seconds=$seconds executions=${runs:-0} corpus=$(find "target/fuzz/corpus/$target" -type f | wc -l) found=$found"
done
((status == 0)) || echo "a target has failed: see target/fuzz/TARGET.log" >&2
exit "$status"
