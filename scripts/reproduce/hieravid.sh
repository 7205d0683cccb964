#!/usr/bin/env bash
# HieraVid: Hierarchical Token Pruning for Fast Video Large Language Models
# Every row that can be run, with the command that runs it; written by scripts/make_reproduce.py. --help says more.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/run.sh"

# Not run:
# Table 4: - Layer-level Balancing 30%: no setting takes this part of the method out
# Table 4: - Merge Ratio-guided Segmentation 30%: no setting takes this part of the method out
# Table 4: - Frame-level DPP Pruning 30%: no setting takes this part of the method out
# Table 5: Avg-pool 30%: segments from average-pooled frames are no setting of the method
# Table 7: Average Instruction Tokens 30%: relevance to the mean of the instruction is no setting of the method

# Table 1: LLaVA-Video 100%
# Table 5: Vanilla 100%
# Table 6: Vanilla 100%
# Table 7: Vanilla 100%
run llava-video-7b-64f-plain lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle

# Table 1: StreamingLLM 30%
run llava-video-7b-64f-streamingllm-0.3 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=streamingllm,retention_ratio=0.3

# Table 1: FastV 30%
run llava-video-7b-64f-fastv-0.3 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=fastv,retention_ratio=0.3

# Table 1: PruMerge 30%
run llava-video-7b-64f-prumerge-0.3 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=prumerge,retention_ratio=0.3

# Table 1: PruneVid 30%
run llava-video-7b-64f-prunevid-0.3 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=prunevid,retention_ratio=0.3

# Table 1: Framefusion 30%
run llava-video-7b-64f-framefusion-0.3 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=framefusion,retention_ratio=0.3

# Table 1: HieraVid 30%
# Table 4: HieraVid 30%
# Table 5: Merge Ratio-based segmentation 30%
# Table 6: lambda 0.5 30%
# Table 7: Last Instruction Token 30%
run llava-video-7b-64f-hieravid-30 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=hieravid-30

# Table 1: StreamingLLM 20%
run llava-video-7b-64f-streamingllm-0.2 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=streamingllm,retention_ratio=0.2

# Table 1: FastV 20%
run llava-video-7b-64f-fastv-0.2 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=fastv,retention_ratio=0.2

# Table 1: PruMerge 20%
run llava-video-7b-64f-prumerge-0.2 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=prumerge,retention_ratio=0.2

# Table 1: PruneVid 20%
run llava-video-7b-64f-prunevid-0.2 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=prunevid,retention_ratio=0.2

# Table 1: Framefusion 20%
run llava-video-7b-64f-framefusion-0.2 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=framefusion,retention_ratio=0.2

# Table 1: HieraVid 20%
run llava-video-7b-64f-hieravid-20 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=hieravid-20

# Table 1: StreamingLLM 10%
run llava-video-7b-64f-streamingllm-0.1 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=streamingllm,retention_ratio=0.1

# Table 1: FastV 10%
run llava-video-7b-64f-fastv-0.1 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=fastv,retention_ratio=0.1

# Table 1: PruMerge 10%
run llava-video-7b-64f-prumerge-0.1 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=prumerge,retention_ratio=0.1

# Table 1: PruneVid 10%
run llava-video-7b-64f-prunevid-0.1 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=prunevid,retention_ratio=0.1

# Table 1: Framefusion 10%
run llava-video-7b-64f-framefusion-0.1 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=framefusion,retention_ratio=0.1

# Table 1: HieraVid 10%
run llava-video-7b-64f-hieravid-10 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=hieravid-10

# Table 2: LLaVA-OneVision 100%
run llava-onevision-7b-32f-plain llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle

# Table 2: StreamingLLM 30%
run llava-onevision-7b-32f-streamingllm-0.3 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=streamingllm,retention_ratio=0.3

# Table 2: FastV 30%
run llava-onevision-7b-32f-fastv-0.3 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=fastv,retention_ratio=0.3

# Table 2: PruMerge 30%
run llava-onevision-7b-32f-prumerge-0.3 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=prumerge,retention_ratio=0.3

# Table 2: PruneVid 30%
run llava-onevision-7b-32f-prunevid-0.3 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=prunevid,retention_ratio=0.3

# Table 2: Framefusion 30%
run llava-onevision-7b-32f-framefusion-0.3 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=framefusion,retention_ratio=0.3

# Table 2: HieraVid 30%
run llava-onevision-7b-32f-hieravid-30 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=hieravid-30

# Table 2: StreamingLLM 20%
run llava-onevision-7b-32f-streamingllm-0.2 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=streamingllm,retention_ratio=0.2

# Table 2: FastV 20%
run llava-onevision-7b-32f-fastv-0.2 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=fastv,retention_ratio=0.2

# Table 2: PruMerge 20%
run llava-onevision-7b-32f-prumerge-0.2 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=prumerge,retention_ratio=0.2

# Table 2: PruneVid 20%
run llava-onevision-7b-32f-prunevid-0.2 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=prunevid,retention_ratio=0.2

# Table 2: Framefusion 20%
run llava-onevision-7b-32f-framefusion-0.2 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=framefusion,retention_ratio=0.2

# Table 2: HieraVid 20%
run llava-onevision-7b-32f-hieravid-20 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=hieravid-20

# Table 2: StreamingLLM 10%
run llava-onevision-7b-32f-streamingllm-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=streamingllm,retention_ratio=0.1

# Table 2: FastV 10%
run llava-onevision-7b-32f-fastv-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=fastv,retention_ratio=0.1

# Table 2: PruMerge 10%
run llava-onevision-7b-32f-prumerge-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=prumerge,retention_ratio=0.1

# Table 2: PruneVid 10%
run llava-onevision-7b-32f-prunevid-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=prunevid,retention_ratio=0.1

# Table 2: Framefusion 10%
run llava-onevision-7b-32f-framefusion-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=framefusion,retention_ratio=0.1

# Table 2: HieraVid 10%
run llava-onevision-7b-32f-hieravid-10 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,nextqa_mc_test,nextqa_oe_test,videomme,videomme_w_subtitle \
    compression=hieravid-10

# Table 3: Vanilla 100%
run qwen2-vl-7b-32f-plain Qwen/Qwen2-VL-7B-Instruct 32 \
    videomme,videomme_w_subtitle

# Table 3: PruneVid 30%
run qwen2-vl-7b-32f-prunevid-0.3 Qwen/Qwen2-VL-7B-Instruct 32 \
    videomme,videomme_w_subtitle \
    compression=prunevid,retention_ratio=0.3

# Table 3: Framefusion 30%
run qwen2-vl-7b-32f-framefusion-0.3 Qwen/Qwen2-VL-7B-Instruct 32 \
    videomme,videomme_w_subtitle \
    compression=framefusion,retention_ratio=0.3

# Table 3: HieraVid 30%
run qwen2-vl-7b-32f-hieravid-30 Qwen/Qwen2-VL-7B-Instruct 32 \
    videomme,videomme_w_subtitle \
    compression=hieravid-30

# Table 5: No segment 30%
run llava-video-7b-64f-hieravid-30-beta-0 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    egoschema,videomme,videomme_w_subtitle \
    compression=hieravid-30,beta=0

# Table 6: lambda 0 30%
run llava-video-7b-64f-hieravid-30-lam-0 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    egoschema,videomme,videomme_w_subtitle \
    compression=hieravid-30,lam=0

# Table 6: lambda 0.2 30%
run llava-video-7b-64f-hieravid-30-lam-0.2 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    egoschema,videomme,videomme_w_subtitle \
    compression=hieravid-30,lam=0.2

# Table 6: lambda 0.4 30%
run llava-video-7b-64f-hieravid-30-lam-0.4 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    egoschema,videomme,videomme_w_subtitle \
    compression=hieravid-30,lam=0.4

# Table 6: lambda 0.6 30%
run llava-video-7b-64f-hieravid-30-lam-0.6 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    egoschema,videomme,videomme_w_subtitle \
    compression=hieravid-30,lam=0.6

# Table 6: lambda 0.8 30%
run llava-video-7b-64f-hieravid-30-lam-0.8 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    egoschema,videomme,videomme_w_subtitle \
    compression=hieravid-30,lam=0.8

# Table 6: lambda 1 30%
run llava-video-7b-64f-hieravid-30-lam-1 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    egoschema,videomme,videomme_w_subtitle \
    compression=hieravid-30,lam=1
