#!/usr/bin/env bash
# Runs examples/ray_batch.py on this machine: two actors, a killed run, a resumed one. Makes an environment of its own
# (2 GB). Arguments are handed to pytest.
#
# usage: scripts/test_ray.sh [ARGUMENTS OF PYTEST]
#
# Variables: PYTHON (3.11 or newer, default python3), VENV_RAY (.venv-ray), made if missing.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$(realpath -m "${VENV_RAY:-.venv-ray}")

if ! "$venv/bin/python" -c "import ray.data, pyarrow, pytest, vidcompress" > /dev/null 2>&1; then
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install -c constraints.txt -e ".[video,cli]" "ray[data]==2.60.0" pytest
fi

export VIDCOMPRESS_RAY=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$venv/bin/python" -m pytest --confcutdir=tests/ray_offline tests/ray_offline "$@"
