#!/usr/bin/env bash
# InfoMerge: Information-aware Token Compression for Efficient Video Large Language Models
# Every row that can be run, with the command that runs it; written by scripts/make_reproduce.py. --help says more.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/run.sh"

# Not run:
# Table 1: MMG-Vid 15%: publishes neither code nor its equations; it is not guessed at
# Table 2: MMG-Vid 15%: publishes neither code nor its equations; it is not guessed at
# Table 2: MMG-Vid 10%: publishes neither code nor its equations; it is not guessed at

# Table 1: LLaVA-OV-7B 100%
# Table 3: LLaVA-OV-7B 100%
run llava-onevision-7b-32f-plain llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme,mlvu_dev,longvideobench_val_v

# Table 1: FastV 100%/15%
run llava-onevision-7b-32f-fastv-0.15 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme,mlvu_dev,longvideobench_val_v \
    compression=fastv,retention_ratio=0.15

# Table 1: VisionZip 15%
run llava-onevision-7b-32f-visionzip-0.15 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme,mlvu_dev,longvideobench_val_v \
    compression=visionzip,retention_ratio=0.15

# Table 1: FastVID 15%
# Table 4: FastVID 15%
# Table 5: FastVID 15%
run llava-onevision-7b-32f-fastvid-0.15 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme,mlvu_dev,longvideobench_val_v \
    compression=fastvid,retention_ratio=0.15

# Table 1: Ours 15%
# Table 3: Ours 15%
# Table 4: TFD, uniqueness, richness 15%
# Table 5: TFD, CABA 15%
run llava-onevision-7b-32f-infomerge-0.15 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme,mlvu_dev,longvideobench_val_v \
    compression=infomerge,retention_ratio=0.15

# Table 1: FastV 100%/10%
run llava-onevision-7b-32f-fastv-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme,mlvu_dev,longvideobench_val_v \
    compression=fastv,retention_ratio=0.1

# Table 1: VisionZip 10%
run llava-onevision-7b-32f-visionzip-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme,mlvu_dev,longvideobench_val_v \
    compression=visionzip,retention_ratio=0.1

# Table 1: FastVID 10%
# Table 4: FastVID 10%
# Table 5: FastVID 10%
run llava-onevision-7b-32f-fastvid-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme,mlvu_dev,longvideobench_val_v \
    compression=fastvid,retention_ratio=0.1

# Table 1: Ours 10%
# Table 3: Ours 10%
# Table 4: TFD, uniqueness, richness 10%
# Table 5: TFD, CABA 10%
# Table 6: uniqueness 0.90, richness 0.10 10%
run llava-onevision-7b-32f-infomerge-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme,mlvu_dev,longvideobench_val_v \
    compression=infomerge,retention_ratio=0.1

# Table 1: FastV 100%/5%
run llava-onevision-7b-32f-fastv-0.05 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme,mlvu_dev,longvideobench_val_v \
    compression=fastv,retention_ratio=0.05

# Table 1: VisionZip 5%
run llava-onevision-7b-32f-visionzip-0.05 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme,mlvu_dev,longvideobench_val_v \
    compression=visionzip,retention_ratio=0.05

# Table 1: FastVID 5%
# Table 4: FastVID 5%
# Table 5: FastVID 5%
run llava-onevision-7b-32f-fastvid-0.05 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme,mlvu_dev,longvideobench_val_v \
    compression=fastvid,retention_ratio=0.05

# Table 1: Ours 5%
# Table 3: Ours 5%
# Table 4: TFD, uniqueness, richness 5%
# Table 5: TFD, CABA 5%
run llava-onevision-7b-32f-infomerge-0.05 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme,mlvu_dev,longvideobench_val_v \
    compression=infomerge,retention_ratio=0.05

# Table 2: LLaVA-Video-7B 100%
run llava-video-7b-64f-plain lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,videomme

# Table 2: FastV 15%
run llava-video-7b-64f-fastv-0.15 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,videomme \
    compression=fastv,retention_ratio=0.15

# Table 2: VisionZip 15%
run llava-video-7b-64f-visionzip-0.15 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,videomme \
    compression=visionzip,retention_ratio=0.15

# Table 2: FastVID 15%
run llava-video-7b-64f-fastvid-0.15 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,videomme \
    compression=fastvid,retention_ratio=0.15

# Table 2: Ours 15%
run llava-video-7b-64f-infomerge-0.15 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,videomme \
    compression=infomerge,retention_ratio=0.15

# Table 2: FastV 10%
run llava-video-7b-64f-fastv-0.1 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,videomme \
    compression=fastv,retention_ratio=0.1

# Table 2: VisionZip 10%
run llava-video-7b-64f-visionzip-0.1 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,videomme \
    compression=visionzip,retention_ratio=0.1

# Table 2: FastVID 10%
run llava-video-7b-64f-fastvid-0.1 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,videomme \
    compression=fastvid,retention_ratio=0.1

# Table 2: Ours 10%
run llava-video-7b-64f-infomerge-0.1 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,videomme \
    compression=infomerge,retention_ratio=0.1

# Table 4: TFD 5%
run llava-onevision-7b-32f-infomerge-0.05-uniqueness_weight-0-richness_weight-0 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.05,uniqueness_weight=0,richness_weight=0

# Table 4: TFD 10%
run llava-onevision-7b-32f-infomerge-0.1-uniqueness_weight-0-richness_weight-0 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.1,uniqueness_weight=0,richness_weight=0

# Table 4: TFD 15%
run llava-onevision-7b-32f-infomerge-0.15-uniqueness_weight-0-richness_weight-0 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.15,uniqueness_weight=0,richness_weight=0

# Table 4: TFD, uniqueness 5%
run llava-onevision-7b-32f-infomerge-0.05-uniqueness_weight-1-richness_weight-0 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.05,uniqueness_weight=1,richness_weight=0

# Table 4: TFD, uniqueness 10%
# Table 6: uniqueness 1.00, richness 0.00 10%
run llava-onevision-7b-32f-infomerge-0.1-uniqueness_weight-1-richness_weight-0 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.1,uniqueness_weight=1,richness_weight=0

# Table 4: TFD, uniqueness 15%
run llava-onevision-7b-32f-infomerge-0.15-uniqueness_weight-1-richness_weight-0 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.15,uniqueness_weight=1,richness_weight=0

# Table 4: TFD, richness 5%
run llava-onevision-7b-32f-infomerge-0.05-uniqueness_weight-0-richness_weight-1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.05,uniqueness_weight=0,richness_weight=1

# Table 4: TFD, richness 10%
# Table 6: uniqueness 0.00, richness 1.00 10%
run llava-onevision-7b-32f-infomerge-0.1-uniqueness_weight-0-richness_weight-1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.1,uniqueness_weight=0,richness_weight=1

# Table 4: TFD, richness 15%
run llava-onevision-7b-32f-infomerge-0.15-uniqueness_weight-0-richness_weight-1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.15,uniqueness_weight=0,richness_weight=1

# Table 5: adjacent differences, CABA 5%
run llava-onevision-7b-32f-infomerge-0.05-fingerprint-first_order llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.05,fingerprint=first_order

# Table 5: adjacent differences, CABA 10%
run llava-onevision-7b-32f-infomerge-0.1-fingerprint-first_order llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.1,fingerprint=first_order

# Table 5: adjacent differences, CABA 15%
run llava-onevision-7b-32f-infomerge-0.15-fingerprint-first_order llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.15,fingerprint=first_order

# Table 6: uniqueness 0.80, richness 0.20 10%
run llava-onevision-7b-32f-infomerge-0.1-uniqueness_weight-0.8-richness_weight-0.2 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.1,uniqueness_weight=0.8,richness_weight=0.2

# Table 6: uniqueness 0.70, richness 0.30 10%
run llava-onevision-7b-32f-infomerge-0.1-uniqueness_weight-0.7-richness_weight-0.3 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.1,uniqueness_weight=0.7,richness_weight=0.3

# Table 6: uniqueness 0.60, richness 0.40 10%
run llava-onevision-7b-32f-infomerge-0.1-uniqueness_weight-0.6-richness_weight-0.4 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.1,uniqueness_weight=0.6,richness_weight=0.4

# Table 6: uniqueness 0.50, richness 0.50 10%
run llava-onevision-7b-32f-infomerge-0.1-uniqueness_weight-0.5-richness_weight-0.5 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.1,uniqueness_weight=0.5,richness_weight=0.5

# Table 6: uniqueness 0.30, richness 0.70 10%
run llava-onevision-7b-32f-infomerge-0.1-uniqueness_weight-0.3-richness_weight-0.7 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    videomme \
    compression=infomerge,retention_ratio=0.1,uniqueness_weight=0.3,richness_weight=0.7
