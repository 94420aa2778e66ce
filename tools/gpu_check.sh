#!/usr/bin/env bash
# The gpu tier, and one short benchmark, on a CUDA machine that holds torch, numpy, safetensors and pytest; installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
mkdir "$place/effformer"
for item in effformer/*; do ln -s "$PWD/$item" "$place/$item"; done
for name in models compress export; do ln -s "$PWD/$name" "$place/effformer/$name"; done

"$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"
PYTHONPATH="$place:$PWD/tests:$PWD/tests/conformance:$PWD/tools" "$python" -m pytest \
    -o addopts="" -p no:cacheprovider --import-mode=importlib -q -m gpu tests/gpu "$@"
PYTHONPATH="$place" "$python" benchmarks/gpu.py
