#!/usr/bin/env bash
# Unified Spatiotemporal Token Compression for Video-LLMs at Ultra-Low Retention
# Every row that can be run, with the command that runs it; written by scripts/make_reproduce.py. --help says more.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/run.sh"

# Not run:
# Table 5: similarity 2%: candidates come in the order of attention; no setting changes that
# Table 5: clusters 2%: candidates come in the order of attention; no setting changes that
# Table 5: similarity, clusters 2%: candidates come in the order of attention; no setting changes that
# Table S2: DyToK 15%: needs a first look at attention inside the LLM before anything is compressed; not implemented
# Table S2: DyToK 10%: needs a first look at attention inside the LLM before anything is compressed; not implemented
# Table S2: DyToK 5%: needs a first look at attention inside the LLM before anything is compressed; not implemented
# Table S2: DyToK 2%: needs a first look at attention inside the LLM before anything is compressed; not implemented
# Table S2: DyToK 1%: needs a first look at attention inside the LLM before anything is compressed; not implemented

# Table 1: LLaVA-OV-7B 100%
# Table 4: Vanilla 100%
# Table 6: Vanilla 100%
# Table S2: LLaVA-OV-7B 100%
# Table S3: LLaVA-OV-7B 100%
# Table S5: Vanilla 100%
# Table S6: Vanilla 100%
# Table S7: Vanilla 100%
# Table S8: Vanilla 100%
run llava-onevision-7b-32f-plain llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme,activitynetqa

# Table 1: FastV 100%/10%
# Table S2: FastV 100%/10%
run llava-onevision-7b-32f-fastv-0.1-layer-3 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastv,retention_ratio=0.1,layer=3

# Table 1: VisionZip 10%
# Table S2: VisionZip 10%
run llava-onevision-7b-32f-visionzip-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=visionzip,retention_ratio=0.1

# Table 1: LLaVA-Scissor 10%
# Table S2: LLaVA-Scissor 10%
run llava-onevision-7b-32f-llava_scissor-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=llava_scissor,retention_ratio=0.1

# Table 1: FastVID 10%
# Table S2: FastVID 10%
run llava-onevision-7b-32f-fastvid-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastvid,retention_ratio=0.1

# Table 1: HoliTom 10%/5%
# Table S2: HoliTom 10%/5%
run llava-onevision-7b-32f-holitom-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=holitom,retention_ratio=0.1

# Table 1: Ours (w/o M) 10%
# Table S2: Ours (w/o M) 10%
run llava-onevision-7b-32f-unified_pool-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.1

# Table 1: Ours 10%/5%
# Table S2: Ours 10%/5%
run llava-onevision-7b-32f-unified-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.1

# Table 1: FastV 100%/15%
# Table S2: FastV 100%/5%
run llava-onevision-7b-32f-fastv-0.05-layer-3 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastv,retention_ratio=0.05,layer=3

# Table 1: VisionZip 5%
# Table S2: VisionZip 5%
run llava-onevision-7b-32f-visionzip-0.05 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=visionzip,retention_ratio=0.05

# Table 1: LLaVA-Scissor 5%
# Table S2: LLaVA-Scissor 5%
run llava-onevision-7b-32f-llava_scissor-0.05 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=llava_scissor,retention_ratio=0.05

# Table 1: FastVID 5%
# Table S2: FastVID 5%
run llava-onevision-7b-32f-fastvid-0.05 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastvid,retention_ratio=0.05

# Table 1: HoliTom 5%/2.5%
# Table S2: HoliTom 5%/2.5%
run llava-onevision-7b-32f-holitom-0.05 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=holitom,retention_ratio=0.05

# Table 1: Ours (w/o M) 5%
# Table S2: Ours (w/o M) 5%
run llava-onevision-7b-32f-unified_pool-0.05 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.05

# Table 1: Ours 5%/2.5%
# Table S2: Ours 5%/2.5%
run llava-onevision-7b-32f-unified-0.05 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.05

# Table 1: FastV 100%/12%
# Table S2: FastV 100%/2%
run llava-onevision-7b-32f-fastv-0.02-layer-3 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastv,retention_ratio=0.02,layer=3

# Table 1: VisionZip 2%
# Table 6: VisionZip 2%
# Table S2: VisionZip 2%
# Table S3: VisionZip 2%
run llava-onevision-7b-32f-visionzip-0.02 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme,activitynetqa \
    compression=visionzip,retention_ratio=0.02

# Table 1: FastVID 2%
# Table 6: FastVid 2%
# Table S2: FastVID 2%
# Table S3: FastVid 2%
run llava-onevision-7b-32f-fastvid-0.02 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme,activitynetqa \
    compression=fastvid,retention_ratio=0.02

# Table 1: HoliTom 2%/1%
# Table 6: HoliTom 2%
# Table S2: HoliTom 2%/1%
# Table S3: HoliTom 2%
run llava-onevision-7b-32f-holitom-0.02 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme,activitynetqa \
    compression=holitom,retention_ratio=0.02

# Table 1: Ours (w/o M) 2%
# Table 5: attention, similarity, clusters 2%
# Table S2: Ours (w/o M) 2%
# Table S6: tau 0.7 2%
# Table S7: share 0.3 2%
run llava-onevision-7b-32f-unified_pool-0.02 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02

# Table 1: Ours 2%/1%
# Table 6: Ours 2%
# Table S2: Ours 2%/1%
# Table S3: Ours 2%
# Table S5: K 18 2%/1%
# Table S8: lambda 0.5 2%/1%
run llava-onevision-7b-32f-unified-0.02 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme,activitynetqa \
    compression=unified,retention_ratio=0.02

# Table 1: FastV 100%/11%
# Table S2: FastV 100%/1%
run llava-onevision-7b-32f-fastv-0.01-layer-3 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastv,retention_ratio=0.01,layer=3

# Table 1: VisionZip 1%
# Table S2: VisionZip 1%
run llava-onevision-7b-32f-visionzip-0.01 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=visionzip,retention_ratio=0.01

# Table 1: FastVID 1%
# Table S2: FastVID 1%
run llava-onevision-7b-32f-fastvid-0.01 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastvid,retention_ratio=0.01

# Table 1: HoliTom 1%/0.5%
# Table S2: HoliTom 1%/0.5%
run llava-onevision-7b-32f-holitom-0.01 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=holitom,retention_ratio=0.01

# Table 1: Ours (w/o M) 1%
# Table S2: Ours (w/o M) 1%
run llava-onevision-7b-32f-unified_pool-0.01 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.01

# Table 1: Ours 1%/0.5%
# Table S2: Ours 1%/0.5%
run llava-onevision-7b-32f-unified-0.01 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.01

# Table 2a: LLaVA-Video-7B 100%
run llava-video-7b-64f-plain lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme

# Table 2a: FastV 100%/2%
run llava-video-7b-64f-fastv-0.02-layer-3 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastv,retention_ratio=0.02,layer=3

# Table 2a: VisionZip 2%
run llava-video-7b-64f-visionzip-0.02 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=visionzip,retention_ratio=0.02

# Table 2a: FastVid 2%
run llava-video-7b-64f-fastvid-0.02 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastvid,retention_ratio=0.02

# Table 2a: HoliTom 2%/1%
run llava-video-7b-64f-holitom-0.02 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=holitom,retention_ratio=0.02

# Table 2a: Ours (w/o M) 2%
run llava-video-7b-64f-unified_pool-0.02 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02

# Table 2a: Ours 2%/1%
run llava-video-7b-64f-unified-0.02 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.02

# Table 2a: FastV 100%/1%
run llava-video-7b-64f-fastv-0.01-layer-3 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastv,retention_ratio=0.01,layer=3

# Table 2a: VisionZip 1%
run llava-video-7b-64f-visionzip-0.01 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=visionzip,retention_ratio=0.01

# Table 2a: FastVid 1%
run llava-video-7b-64f-fastvid-0.01 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastvid,retention_ratio=0.01

# Table 2a: HoliTom 1%/0.5%
run llava-video-7b-64f-holitom-0.01 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=holitom,retention_ratio=0.01

# Table 2a: Ours (w/o M) 1%
run llava-video-7b-64f-unified_pool-0.01 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.01

# Table 2a: Ours 1%/0.5%
run llava-video-7b-64f-unified-0.01 lmms-lab/LLaVA-Video-7B-Qwen2 64 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.01

# Table 2b: LLaVA-OV-0.5B 100%
run llava-onevision-0.5b-32f-plain llava-hf/llava-onevision-qwen2-0.5b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme

# Table 2b: FastV 100%/2%
run llava-onevision-0.5b-32f-fastv-0.02-layer-3 llava-hf/llava-onevision-qwen2-0.5b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastv,retention_ratio=0.02,layer=3

# Table 2b: VisionZip 2%
run llava-onevision-0.5b-32f-visionzip-0.02 llava-hf/llava-onevision-qwen2-0.5b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=visionzip,retention_ratio=0.02

# Table 2b: FastVid 2%
run llava-onevision-0.5b-32f-fastvid-0.02 llava-hf/llava-onevision-qwen2-0.5b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastvid,retention_ratio=0.02

# Table 2b: HoliTom 2%/1%
run llava-onevision-0.5b-32f-holitom-0.02-layer-18 llava-hf/llava-onevision-qwen2-0.5b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=holitom,retention_ratio=0.02,layer=18

# Table 2b: Ours (w/o M) 2%
run llava-onevision-0.5b-32f-unified_pool-0.02 llava-hf/llava-onevision-qwen2-0.5b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02

# Table 2b: Ours 2%/1%
run llava-onevision-0.5b-32f-unified-0.02-layer-18 llava-hf/llava-onevision-qwen2-0.5b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.02,layer=18

# Table 2b: FastV 100%/1%
run llava-onevision-0.5b-32f-fastv-0.01-layer-3 llava-hf/llava-onevision-qwen2-0.5b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastv,retention_ratio=0.01,layer=3

# Table 2b: VisionZip 1%
run llava-onevision-0.5b-32f-visionzip-0.01 llava-hf/llava-onevision-qwen2-0.5b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=visionzip,retention_ratio=0.01

# Table 2b: FastVid 1%
run llava-onevision-0.5b-32f-fastvid-0.01 llava-hf/llava-onevision-qwen2-0.5b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastvid,retention_ratio=0.01

# Table 2b: HoliTom 1%/0.5%
run llava-onevision-0.5b-32f-holitom-0.01-layer-18 llava-hf/llava-onevision-qwen2-0.5b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=holitom,retention_ratio=0.01,layer=18

# Table 2b: Ours (w/o M) 1%
run llava-onevision-0.5b-32f-unified_pool-0.01 llava-hf/llava-onevision-qwen2-0.5b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.01

# Table 2b: Ours 1%/0.5%
run llava-onevision-0.5b-32f-unified-0.01-layer-18 llava-hf/llava-onevision-qwen2-0.5b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.01,layer=18

# Table 3: Vanilla 100%
# Table S4: Vanilla 100%
run llava-onevision-7b-16f-plain llava-hf/llava-onevision-qwen2-7b-ov-hf 16 \
    videomme,mvbench,egoschema,mlvu_test,longvideobench_val_v

# Table 3: HoliTom 2%/1%
# Table S4: HoliTom 2%/1%
run llava-onevision-7b-64f-holitom-0.02 llava-hf/llava-onevision-qwen2-7b-ov-hf 64 \
    videomme,mvbench,egoschema,mlvu_test,longvideobench_val_v \
    compression=holitom,retention_ratio=0.02

# Table 3: Ours 2%/1%
# Table S4: Ours 2%/1%
run llava-onevision-7b-64f-unified-0.02 llava-hf/llava-onevision-qwen2-7b-ov-hf 64 \
    videomme,mvbench,egoschema,mlvu_test,longvideobench_val_v \
    compression=unified,retention_ratio=0.02

# Table 3: HoliTom 2%/1%
# Table S4: HoliTom 2%/1%
run llava-onevision-7b-96f-holitom-0.02 llava-hf/llava-onevision-qwen2-7b-ov-hf 96 \
    videomme,mvbench,egoschema,mlvu_test,longvideobench_val_v \
    compression=holitom,retention_ratio=0.02

# Table 3: Ours 2%/1%
# Table S4: Ours 2%/1%
run llava-onevision-7b-96f-unified-0.02 llava-hf/llava-onevision-qwen2-7b-ov-hf 96 \
    videomme,mvbench,egoschema,mlvu_test,longvideobench_val_v \
    compression=unified,retention_ratio=0.02

# Table 3: HoliTom 2%/1%
# Table S4: HoliTom 2%/1%
run llava-onevision-7b-128f-holitom-0.02 llava-hf/llava-onevision-qwen2-7b-ov-hf 128 \
    videomme,mvbench,egoschema,mlvu_test,longvideobench_val_v \
    compression=holitom,retention_ratio=0.02

# Table 3: Ours 2%/1%
# Table S4: Ours 2%/1%
run llava-onevision-7b-128f-unified-0.02 llava-hf/llava-onevision-qwen2-7b-ov-hf 128 \
    videomme,mvbench,egoschema,mlvu_test,longvideobench_val_v \
    compression=unified,retention_ratio=0.02

# Table 4: FastVid 25%
run llava-onevision-7b-32f-fastvid-0.25 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,longvideobench_val_v \
    compression=fastvid,retention_ratio=0.25

# Table 4: VisionZip 25%
run llava-onevision-7b-32f-visionzip-0.25 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,longvideobench_val_v \
    compression=visionzip,retention_ratio=0.25

# Table 4: HoliTom 15%
# Table S2: HoliTom 15%/7.5%
run llava-onevision-7b-32f-holitom-0.15 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,longvideobench_val_v,egoschema,mlvu_test,videomme \
    compression=holitom,retention_ratio=0.15

# Table 4: Ours 15%
# Table S2: Ours 15%/7.5%
run llava-onevision-7b-32f-unified-0.15 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,longvideobench_val_v,egoschema,mlvu_test,videomme \
    compression=unified,retention_ratio=0.15

# Table 5: attention 2%
run llava-onevision-7b-32f-unified_pool-0.02-tau-1-cluster_share-0 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02,tau=1,cluster_share=0

# Table 5: attention, similarity 2%
run llava-onevision-7b-32f-unified_pool-0.02-cluster_share-0 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02,cluster_share=0

# Table 5: attention, clusters 2%
run llava-onevision-7b-32f-unified_pool-0.02-tau-1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02,tau=1

# Table S1: Qwen2.5-VL 100%
run qwen2.5-vl-7b-32f-plain Qwen/Qwen2.5-VL-7B-Instruct 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme

# Table S1: VisionZip 2%
run qwen2.5-vl-7b-32f-visionzip-0.02 Qwen/Qwen2.5-VL-7B-Instruct 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=visionzip,retention_ratio=0.02

# Table S1: FastVID 2%
run qwen2.5-vl-7b-32f-fastvid-0.02 Qwen/Qwen2.5-VL-7B-Instruct 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastvid,retention_ratio=0.02

# Table S1: Ours(w/o M) 2%
run qwen2.5-vl-7b-32f-unified_pool-0.02 Qwen/Qwen2.5-VL-7B-Instruct 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02

# Table S1: Ours 2%
run qwen2.5-vl-7b-32f-unified-0.02 Qwen/Qwen2.5-VL-7B-Instruct 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.02

# Table S1: VisionZip 1%
run qwen2.5-vl-7b-32f-visionzip-0.01 Qwen/Qwen2.5-VL-7B-Instruct 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=visionzip,retention_ratio=0.01

# Table S1: FastVID 1%
run qwen2.5-vl-7b-32f-fastvid-0.01 Qwen/Qwen2.5-VL-7B-Instruct 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastvid,retention_ratio=0.01

# Table S1: Ours(w/o M) 1%
run qwen2.5-vl-7b-32f-unified_pool-0.01 Qwen/Qwen2.5-VL-7B-Instruct 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.01

# Table S1: Ours 1%
run qwen2.5-vl-7b-32f-unified-0.01 Qwen/Qwen2.5-VL-7B-Instruct 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.01

# Table S2: VisionZip 15%
run llava-onevision-7b-32f-visionzip-0.15 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=visionzip,retention_ratio=0.15

# Table S2: FastVID 15%
run llava-onevision-7b-32f-fastvid-0.15 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=fastvid,retention_ratio=0.15

# Table S5: K 2 2%/1%
run llava-onevision-7b-32f-unified-0.02-layer-2 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.02,layer=2

# Table S5: K 7 2%/1%
run llava-onevision-7b-32f-unified-0.02-layer-7 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.02,layer=7

# Table S5: K 14 2%/1%
run llava-onevision-7b-32f-unified-0.02-layer-14 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.02,layer=14

# Table S5: K 21 2%/1%
run llava-onevision-7b-32f-unified-0.02-layer-21 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.02,layer=21

# Table S6: tau 0.5 2%
run llava-onevision-7b-32f-unified_pool-0.02-tau-0.5 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02,tau=0.5

# Table S6: tau 0.6 2%
run llava-onevision-7b-32f-unified_pool-0.02-tau-0.6 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02,tau=0.6

# Table S6: tau 0.8 2%
run llava-onevision-7b-32f-unified_pool-0.02-tau-0.8 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02,tau=0.8

# Table S6: tau 0.9 2%
run llava-onevision-7b-32f-unified_pool-0.02-tau-0.9 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02,tau=0.9

# Table S7: share 0.1 2%
run llava-onevision-7b-32f-unified_pool-0.02-cluster_share-0.1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02,cluster_share=0.1

# Table S7: share 0.2 2%
run llava-onevision-7b-32f-unified_pool-0.02-cluster_share-0.2 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02,cluster_share=0.2

# Table S7: share 0.4 2%
run llava-onevision-7b-32f-unified_pool-0.02-cluster_share-0.4 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02,cluster_share=0.4

# Table S7: share 0.5 2%
run llava-onevision-7b-32f-unified_pool-0.02-cluster_share-0.5 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02,cluster_share=0.5

# Table S7: share 0.6 2%
run llava-onevision-7b-32f-unified_pool-0.02-cluster_share-0.6 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02,cluster_share=0.6

# Table S7: share 0.7 2%
run llava-onevision-7b-32f-unified_pool-0.02-cluster_share-0.7 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified_pool,retention_ratio=0.02,cluster_share=0.7

# Table S8: lambda 0 2%/1%
run llava-onevision-7b-32f-unified-0.02-text_weight-0 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.02,text_weight=0

# Table S8: lambda 0.25 2%/1%
run llava-onevision-7b-32f-unified-0.02-text_weight-0.25 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.02,text_weight=0.25

# Table S8: lambda 0.75 2%/1%
run llava-onevision-7b-32f-unified-0.02-text_weight-0.75 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.02,text_weight=0.75

# Table S8: lambda 1 2%/1%
run llava-onevision-7b-32f-unified-0.02-text_weight-1 llava-hf/llava-onevision-qwen2-7b-ov-hf 32 \
    mvbench,egoschema,mlvu_test,longvideobench_val_v,videomme \
    compression=unified,retention_ratio=0.02,text_weight=1
