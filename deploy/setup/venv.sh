#!/usr/bin/env bash
# A virtual environment in the folder $1, with a pip of its own. Debian and Ubuntu keep what `python3 -m venv` takes its pip
# from in another package than pip itself, so it comes by pip.
set -euo pipefail
python3 -m venv --without-pip "$1"
site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python3 -m pip --disable-pip-version-check install --quiet --no-deps --target "$site" pip==26.1
