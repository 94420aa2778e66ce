#!/usr/bin/env bash
# The gpu tier, and one short benchmark, on a CUDA machine that holds torch, timm (with safetensors), numpy and pytest;
# installs and downloads nothing, and takes at most five minutes. What needs xformers or bitsandbytes is skipped without it.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
mkdir "$place/effformer"
for item in effformer/*; do ln -s "$PWD/$item" "$place/$item"; done
for name in models compress export; do ln -s "$PWD/$name" "$place/effformer/$name"; done

export CUBLAS_WORKSPACE_CONFIG=:4096:8 # products are the same in every run, as a resumed training needs
"$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"
PYTHONPATH="$place:$PWD/tests:$PWD/tests/conformance:$PWD/tools" timeout 240 "$python" -m pytest \
    -o addopts="" -p no:cacheprovider --import-mode=importlib -q -rs -m gpu tests/gpu "$@"
PYTHONPATH="$place" timeout 60 "$python" benchmarks/gpu.py
