#!/usr/bin/env bash
# Builds the whole binary for GPUs on a machine that has none, to be carried to one that has: target/gpu/gleaner, which says at its start
# where it looks for libtorch and NVIDIA's libraries.
#   gpu.sh                 against the libtorch that everything here is built with
#   TORCH=2.11.0 gpu.sh    against another one, such as that of a Python environment that is there already. That is done in a copy of what
#                          git tracks here, target/gpu/TORCH: tch goes with torch, and the requirements' hashes are only of the pinned one.
#   PROFILE=dev            sooner
set -euo pipefail
cd "$(dirname "$0")/../.."
top=$PWD out=$PWD/target/gpu profile=${PROFILE:-release}
pinned=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' deploy/setup/libtorch.txt) torch=${TORCH:-$pinned}
mkdir -p "$out"

if [[ $torch != "$pinned" ]]; then
    case $torch in
    2.11.*) tch=0.24 ;;
    2.12.*) tch=0.25 ;;
    2.13.*) tch=0.26 ;;
    *) echo "gpu.sh: which tch wraps torch $torch? Its README says; name it here" >&2 && exit 2 ;;
    esac
    copy=$out/$torch
    mkdir -p "$copy/target"
    git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -cf - | tar -C "$copy" -xf -
    ln -sfn "$top/target/tools" "$copy/target/tools"
    cd "$copy"
    sed -i -E "s/^(tch|torch-sys) = \{ version = \"[0-9.]+\"/\1 = { version = \"$tch\"/" Cargo.toml
    sed -i -E -e '/^ +--hash=/d' -e 's/ \\$//' -e "s/^torch==.*/torch==$torch/" deploy/setup/libtorch.txt deploy/setup/cuda.txt
    sed -i 's/"--require-hashes", //' deploy/setup/libtorch.py
    # The wheel says which NCCL torch was compiled with; our shim must see the same one's header.
    make target/libtorch/build-version
    nccl=$(python3 -c 'import re, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))).decode()
print(re.search(r"(?m)^Requires-Dist: (nvidia-nccl-cu\d+==[0-9.]+)", metadata)[1])' target/wheels/torch-"$torch"-*.whl)
    sed -i -E "s/^nvidia-nccl-cu[0-9]+==.*/$nccl/" deploy/setup/cuda.txt
    cargo update --quiet -p tch -p torch-sys
    # tch's patch version may have been made for another of torch's.
    export LIBTORCH_BYPASS_VERSION_CHECK=1
fi

[[ -e target/libtorch-cuda/full ]] || make libtorch CUDA=1 LINK_ONLY=1
LIBTORCH=$PWD/target/libtorch-cuda CARGO_TARGET_DIR=$PWD/target/gpu/build \
    cargo build --locked --profile "$profile" --features nccl -p gleaner
built=target/gpu/build/$([[ $profile == dev ]] && echo debug || echo "$profile")/gleaner
"$built" doctor --help >/dev/null
strip -o "$out/gleaner" "$built"
ls -l "$out/gleaner"
echo "built against torch $torch and NCCL $(<target/libtorch-cuda/nccl-version). On the machine with the GPU, with the libraries of its torch:"
echo "    torch=\$(python3 -c 'import importlib.util as u; print(u.find_spec(\"torch\").submodule_search_locations[0])')"
echo "    export LD_LIBRARY_PATH=\$torch/lib\$(printf ':%s' \"\$(dirname \"\$torch\")\"/nvidia/*/lib)"
