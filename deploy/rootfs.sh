#!/usr/bin/env bash
# The file system of an image: the binary, the shared libraries that it needs, CA certificates, a user, and nothing else.
#
#   rootfs.sh BINARY FOLDER [LIBTORCH]
#
# The libraries are this machine's, so BINARY must be built on it. LIBTORCH is the libtorch that BINARY was built with; one with
# CUDA is copied whole, because its parts load each other by name.
set -euo pipefail
binary=$1 root=$2 libtorch=${3:-}

rm -rf "$root"
mkdir -p "$root"/{etc/ssl/certs,tmp,usr/local/bin}
chmod 1777 "$root/tmp"
strip -o "$root/usr/local/bin/gleaner" "$binary"
chmod 755 "$root/usr/local/bin/gleaner"

if [[ -n $libtorch ]]; then
    libtorch=$(realpath "$libtorch")
    mkdir -p "$root/opt/libtorch/lib"
    if [[ -e $libtorch/lib/libtorch_cuda.so ]]; then cp -a "$libtorch"/lib/*.so* "$root/opt/libtorch/lib/"; fi
fi
# `ldd` names the loader by its path alone, and every other library as NAME => PATH.
libraries=$(LD_LIBRARY_PATH=${libtorch:+$libtorch/lib} ldd "$binary")
if missing=$(grep 'not found' <<<"$libraries" | grep -v 'libcuda\.so'); then
    echo "rootfs.sh: $binary needs what is not here: $missing" >&2
    exit 1
fi
while read -r path; do
    case $(realpath "$path") in
        "${libtorch:-/none}"/*) to=$root/opt/libtorch/lib/$(basename "$path") ;;
        *) to=$root$path ;;
    esac
    [[ -e $to ]] || install -D -m 755 "$path" "$to"
done < <(awk '$2 == "=>" && $3 ~ /^\// { print $3 } $1 ~ /^\// { print $1 }' <<<"$libraries")

certificates=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
if [[ ! -e $certificates ]]; then
    echo "rootfs.sh: no $certificates; install ca-certificates, or name the file in SSL_CERT_FILE" >&2
    exit 1
fi
install -m 644 "$certificates" "$root/etc/ssl/certs/ca-certificates.crt"
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
echo 'gleaner:x:65532:65532::/tmp:/sbin/nologin' >"$root/etc/passwd"
echo 'gleaner:x:65532:' >"$root/etc/group"
