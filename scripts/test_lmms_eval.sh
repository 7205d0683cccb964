#!/usr/bin/env bash
# Runs lmms-eval with vidcompress's model, offline, on a few clips: one process, two, crashes, resumed runs.
# Makes an environment of its own (2.5 GB), because lmms-eval needs an older PyAV. Arguments are handed to pytest.
#
# usage: scripts/test_lmms_eval.sh [ARGUMENTS OF PYTEST]
#
# Variables: PYTHON (3.11 or newer, default python3), VENV_EVAL (.venv-eval), made if missing.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$(realpath -m "${VENV_EVAL:-.venv-eval}")

if ! "$venv/bin/python" -c "import lmms_eval.models.registry_v2, decord, pytest, skvideo, vidcompress" > /dev/null 2>&1; then
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    # Without pins pip takes the newest torchvision, and for it another torch.
    awk -F '==' '/^#/ {next} NR == FNR {old[$1] = 1; print; next} !($1 in old)' \
        constraints-eval.txt constraints.txt > "$venv/constraints.txt"
    "$venv/bin/python" -m pip install -c "$venv/constraints.txt" -e ".[eval]" pytest scikit-video
fi

export VIDCOMPRESS_LMMS_EVAL=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$venv/bin/python" -m pytest --confcutdir=tests/lmms_eval_offline tests/lmms_eval_offline "$@"
