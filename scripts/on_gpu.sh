#!/usr/bin/env bash
# Does on one GPU all that waits for one: the kernels against their definitions on hardware, then times, memory and
# launches of every op, of every method up to 1024 frames, and of whole prompts of three 7B models with random weights.
# About an hour. What it prints and measures lies in FOLDER, named by the GPU.
#
# usage: scripts/on_gpu.sh [FOLDER]     (default benchmarks/results)
#
# Variables: PYTHON (python3), whose environment has vidcompress[dev,triton]; with flash-attn it measures that, too.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
folder=${1:-benchmarks/results}
if ! name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))' 2> /dev/null); then
    echo "$python sees no CUDA device, or has no torch: set PYTHON to one that does; without a GPU there is" \
        "scripts/launch_report.py" >&2
    exit 2
fi
mkdir -p "$folder"
attention=sdpa
if "$python" -c 'import flash_attn' 2> /dev/null; then
    attention=sdpa,flash_attention_2
fi
"$python" -m pytest -m gpu -p no:xdist -v | tee "$folder/tests-$name.txt"
"$python" scripts/bench_ops.py --grid 32x14x14 --channels 3584 --implementations torch,kernel \
    --out "$folder/ops-$name.json"
"$python" scripts/bench_methods.py --grids 32x14x14,64x13x13 --out "$folder/methods-$name.json"
"$python" scripts/bench_methods.py --methods fastvid,infomerge,unified_pool,uniform_tokens \
    --grids 32x14x14,128x14x14,512x14x14,1024x14x14 --out "$folder/methods-1024-frames-$name.json"
"$python" scripts/bench_prefill.py --attn "$attention" --out "$folder/prefill-$name.json"
