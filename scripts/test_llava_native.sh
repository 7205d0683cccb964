#!/usr/bin/env bash
# Tests models of the llava package, which needs an older transformers than all else, in an environment of its own;
# then compares what they kept with what vidcompress.models keeps of the same videos, in the usual environment.
#
# usage: scripts/test_llava_native.sh PATH_TO_LLAVA_NEXT     (a checkout of LLaVA-VL/LLaVA-NeXT; only its code is used)
#
# Variables: PYTHON (3.11 or newer, default python3), VENV (.venv) and VENV_LLAVA (.venv-llava), made if missing.
set -euo pipefail

if [ $# -ne 1 ]; then
    sed -n 's/^# \(usage: .*\)/\1/p' "$0" >&2
    exit 2
fi
if [ ! -f "$1/llava/model/builder.py" ]; then
    echo "$1 is no checkout of LLaVA-NeXT: it has no llava/model/builder.py" >&2
    exit 2
fi

llava=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$(realpath -m "${VENV:-.venv}")
venv_llava=$(realpath -m "${VENV_LLAVA:-.venv-llava}")

in_llava() { # python of the second environment, which sees llava and this checkout
    PYTHONPATH="$llava:$PWD" "$venv_llava/bin/python" "$@"
}

if [ ! -x "$venv/bin/python" ]; then
    make VENV="$venv" "$venv/.installed-dev"
fi
if ! in_llava -c "import llava.model.language_model.llava_qwen, accelerate, pytest" > /dev/null 2>&1; then
    [ -x "$venv_llava/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv_llava"
    grep -vE '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > "$venv_llava/constraints.txt"
    "$venv_llava/bin/python" -m pip install -c "$venv_llava/constraints.txt" transformers==4.49.0 torch accelerate \
        safetensors PyYAML pytest einops pillow requests sentencepiece
fi

exchange=$(mktemp -d)
trap 'rm -rf "$exchange"' EXIT
export VIDCOMPRESS_LLAVA_NATIVE="$exchange"
in_llava -m pytest --confcutdir=tests/llava_native tests/llava_native
"$venv/bin/python" -m pytest tests/test_llava_native.py
