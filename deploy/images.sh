#!/usr/bin/env bash
# Builds both images out of this machine's own cargo build, as archives in target/images that docker, kind, k3s and containerd load:
#
#   images.sh [gleaner] [gleaner-trainer]      PROFILE=release (or dev, which is there already where tests were run)
#
# Needs buildah, and root or buildah's own rootless set-up; no image is pulled.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v buildah >/dev/null; then
    echo "missing: buildah; to install: apt-get install --no-install-recommends buildah" >&2
    exit 1
fi
version=$(awk -F'"' '/^version = / { print $2; exit }' Cargo.toml)
profile=${PROFILE:-release}
folder=target/$([[ $profile == dev ]] && echo debug || echo "$profile")
export BUILDAH_ISOLATION=chroot
out=target/images
mkdir -p "$out"

# image NAME TAG CARGO-FEATURES [LIBTORCH]
image() {
    local name=$1 tag=$2 features=$3 libtorch=${4:-} reference=docker.io/library/$1:$2 context=$out/context
    # With the trainer beside it, the crates that tests were built of are wanted with the same features, so they serve again.
    local beside=""
    [[ $profile != dev ]] || beside="-p gleaner-trainer"
    # shellcheck disable=SC2086 # several flags, or none
    cargo build --locked --profile "$profile" -p gleaner $beside --no-default-features $features
    deploy/rootfs.sh "$folder/gleaner" "$context/$name" $libtorch
    # The same files give the same image: nothing in it tells of the time.
    buildah bud --quiet --pull-never --timestamp 0 --build-arg BUILD=prebuilt --build-arg TORCH=cpu \
        --target "$name" --tag "$reference" --file deploy/Dockerfile "$context" >/dev/null
    rm -rf "$context" "$out/$name.tar"
    buildah push --quiet "$reference" "docker-archive:$out/$name.tar:$reference"
    # What was built is started once, as the cluster will.
    local container said
    container=$(buildah from --pull-never "$reference")
    said=$(buildah run --user 65532 "$container" -- /usr/local/bin/gleaner --version) || said="does not start"
    buildah rm "$container" >/dev/null
    printf '%s: %s, %s MB, %s MB compressed: %s\n' "$name:$tag" "$out/$name.tar" \
        "$(($(stat -c %s "$out/$name.tar") / 1000000))" "$(($(gzip -6 -c "$out/$name.tar" | wc -c) / 1000000))" "$said"
    [[ $said == "gleaner $version" ]]
}

for name in ${@:-gleaner gleaner-trainer}; do
    case $name in
        gleaner) image gleaner "$version" "" ;;
        gleaner-trainer) image gleaner-trainer "$version-cpu" "--features trainer" "${LIBTORCH:-target/libtorch}" ;;
        *) echo "images.sh: $name is none of gleaner, gleaner-trainer" >&2; exit 2 ;;
    esac
done
