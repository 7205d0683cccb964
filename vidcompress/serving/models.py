"""vLLM's models with compressed videos: how many placeholders a video takes, and what follows its encoder.

The processor (in the API server) counts by `Method.budget`, the model (in every worker) reduces by `Method.reduce`,
each by the grid that the backbone's patch knows. A video is encoded and reduced by itself, whatever else is in the
batch, so that what is kept of it never depends on its company; the ranks of a tensor-parallel engine see the same
features and decide the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.model_executor.models import llava_onevision, qwen2_5_vl, qwen2_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems

from vidcompress import patches
from vidcompress.engine.saliency import pseudo_query
from vidcompress.engine.siglip_head import load_siglip_head
from vidcompress.precision import full_precision
from vidcompress.serving import positions
from vidcompress.serving.plugin import log_active
from vidcompress.serving.positions import Medium
from vidcompress.serving.reduce import shortened
from vidcompress.serving.settings import Serving
from vidcompress.tokens import Grid


# -- the processors: how many placeholders a video takes ---------------------------------------------------------------
class Counting:
    """Makes a processor of vLLM count a video's placeholders as they will be kept. A subclass knows the grids."""

    info: Any
    separate = True
    """Whether there must be text behind every video, by which the model tells where it begins and ends."""

    @property
    def serving(self) -> Serving:
        """What is served."""
        serving = Serving.of(self.info.get_hf_config())
        assert serving is not None
        return serving

    def grid(self, item: Any) -> Grid:
        """(t, h, w) of a processed video's tokens."""
        raise NotImplementedError

    def newlines(self) -> int:
        """Placeholders of a video beside its tokens."""
        return 0

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        serving, newlines = self.serving, self.newlines()

        def placeholders(target: list[int], number: int) -> list[int]:
            return target * (serving.count(self.grid(out_mm_kwargs["video"][number])) + newlines)

        return [
            replace(u, replacement=lambda i, u=u: placeholders(u.target, i)) if u.modality == "video" else u
            for u in updates
        ]

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Caches, also those that engines share, must not hand out what other settings kept."""
        given = inputs.hf_processor_mm_kwargs
        scoped = {**given.get("videos_kwargs", {}), "vidcompress": self.serving.fingerprint}
        given = {**given, "videos_kwargs": scoped}
        return super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=given))  # type: ignore[misc]

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As vLLM's; ValueError, which fails one request, for prompts whose videos cannot be told apart."""
        if isinstance(inputs.mm_data_items.get("video"), (EmbeddingItems, DictEmbeddingItems)):
            raise ValueError("embeddings of videos cannot be compressed, which needs the encoder; send the video")
        result = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        ranges = result["mm_placeholders"]
        if self.separate and ranges.get("video"):
            self._refuse_joined(result["prompt_token_ids"], [*ranges["video"], *ranges.get("image", [])])
        return result

    def _refuse_joined(self, ids: list[int], ranges: Sequence[Any]) -> None:
        config, spans = self.info.get_hf_config(), sorted((found.offset, found.length) for found in ranges)
        here, needed = sum(map(ids.count, (config.image_token_id, config.video_token_id))), sum(n for _, n in spans)
        if here != needed:
            raise ValueError(
                f"the prompt holds {here} placeholders of images and videos, and what is attached needs {needed}: "
                "write no placeholder yourself"
            )
        ends = [offset + length for offset, length in spans]
        if any(end == begin for end, begin in zip(ends, [*(offset for offset, _ in spans[1:]), len(ids)], strict=True)):
            raise ValueError("behind a video, and between media, there must be text (a chat template puts some there)")


class LlavaOnevisionCounting(Counting, llava_onevision.LlavaOnevisionMultiModalProcessor):
    """For LLaVA-OneVision: whose newline behind the video is not counted and always stays."""

    separate = False

    def grid(self, item: Any) -> Grid:
        config = self.info.get_hf_config()
        frame = patches.find(config).frame_grid(config)
        assert frame is not None
        return (len(item["pixel_values_videos"].data), *frame)

    def newlines(self) -> int:
        return 1


class QwenCounting(Counting):
    """For Qwen2-VL and Qwen2.5-VL."""

    def grid(self, item: Any) -> Grid:
        t, h, w = item["video_grid_thw"].data.tolist()
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        return t, h // merge, w // merge


class Qwen2VLCounting(QwenCounting, qwen2_vl.Qwen2VLMultiModalProcessor):
    """For Qwen2-VL."""


class Qwen25VLCounting(QwenCounting, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """For Qwen2.5-VL."""


class Separated:
    """Dummy inputs for measuring memory, with text between the media."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """One placeholder for each, a line between."""
        one = {kind: super(Separated, self).get_dummy_text({kind: 1}) for kind in mm_counts}  # type: ignore[misc]
        return "".join(f"{one[kind]}\n" * count for kind, count in mm_counts.items())


class Qwen2VLDummies(Separated, qwen2_vl.Qwen2VLDummyInputsBuilder):
    """For Qwen2-VL."""


class Qwen25VLDummies(Separated, qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder):
    """For Qwen2.5-VL."""


# -- the models: what becomes of a video behind the encoder ------------------------------------------------------------
class Reducing:
    """Makes a model of vLLM reduce its videos. Its patch sees it as it sees a model of transformers."""

    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        serving = Serving.of(vllm_config.model_config.hf_config)
        assert serving is not None
        self.serving = serving
        self.patch: Any = patches.find(self.config)
        if get_tp_group().broadcast_object(serving.fingerprint) != serving.fingerprint:
            raise RuntimeError(
                f"rank {get_tp_group().rank_in_group} would serve {serving} of vidcompress {serving.version}, and the "
                "first rank something else: start every host with the same options and version of vidcompress"
            )
        log_active("model", serving)

    @property
    def base_model(self) -> Any:
        """Itself: it keeps tower and config where a patch looks for them."""
        return self


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionCounting,
    info=llava_onevision.LlavaOnevisionProcessingInfo,
    dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
class VidcompressLlavaOnevision(Reducing, llava_onevision.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision; saliency and frame features are those of SigLIP's pooling head."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        source = self.serving.head
        self.siglip_head = None if source is None else load_siglip_head(source, self.config.vision_config)

    def _process_video_pixels(self, inputs: Any) -> list[Tensor]:
        return [self._reduced(pixels) for pixels in inputs["pixel_values_videos"]]

    def _reduced(self, pixels: Tensor) -> Tensor:
        """[K + 1, C] survivors and newline of one video of pixels [T, 3, S, S]."""
        hidden: list[Tensor] = []

        def tower(*args: Any, **kwargs: Any) -> Tensor:
            hidden.append(self.vision_tower(*args, **kwargs))
            return hidden[0]

        features = self._video_pixels_to_features(tower, pixels).flatten(0, 1)
        signals = {}
        if self.siglip_head is not None:
            frames, probe = self.siglip_head(hidden[0])
            with full_precision(probe.device):
                signals = {"frame_features": frames, "saliency.head": self.patch.pool_saliency(self, probe)}
        (video,) = self.patch.encoded(self, {"pixel_values_videos": pixels[None]}, signals)
        flat = {name: s if name == "frame_features" else s.flatten(0, 1) for name, s in video.signals.items()}
        kept, _ = shortened(self.serving.method, features, video.grid, flat)
        return torch.cat([kept, self.image_newline[None].to(kept)])


class Attention:
    """Looks at one attention of a tower: its queries and keys after rotation, while `armed`."""

    def __init__(self, module: Any) -> None:
        self.armed, self.scale = False, module.scale
        self.query: Any = None
        self.key: Any = None
        module.register_forward_hook(self._saw, with_kwargs=True)

    def _saw(self, module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if self.armed:
            self.query, self.key = kwargs["query"], kwargs["key"]

    def saliency(self, frames: int, patches: int) -> Tensor:
        """[M] of what was seen last, [1, n, H, D] each: FastVID's rule, the mean over the heads of all ranks."""
        query, key = (x[0].unflatten(0, (frames, -1)).transpose(1, 2) for x in (self.query, self.key))
        self.query = self.key = None
        with full_precision(query.device):
            found = pseudo_query(query, key, self.scale, patches).flatten()
        return tensor_model_parallel_all_reduce(found) / get_tp_group().world_size


class QwenReducing(Reducing):
    """Qwen2-VL and Qwen2.5-VL, whose survivors bring their rotary positions along (`vidcompress.serving.positions`)."""

    visual: Any
    supports_multimodal_pruning = True  # a runner that finds it so asks for positions (`recompute_mrope_positions`)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.is_multimodal_pruning_enabled = False  # vLLM's own pruning of this model, not the runners' part in it
        self.attention = None
        if "saliency.head" in self.serving.method.needs:
            block = self.visual.blocks[self.patch.signal_layer(self, {})]
            self.attention = Attention(block.attn.attn)

    def _process_video_input(self, video_input: Any) -> tuple[Tensor, ...]:
        grids = video_input["video_grid_thw"]
        pixels = video_input["pixel_values_videos"].split(grids.prod(-1).tolist())
        seconds = video_input.get("second_per_grid_ts")
        rate = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        one = [
            {"type": video_input["type"], "pixel_values_videos": pixels[i], "video_grid_thw": grids[i : i + 1]}
            for i in range(len(grids))
        ]
        times = [rate * (1.0 if seconds is None else float(seconds[i])) for i in range(len(grids))]
        return tuple(map(self._reduced, one, times))

    def _reduced(self, video_input: Any, seconds: float) -> Tensor:
        """[K, C] survivors of one video whose frames are so many positions apart, or [K, C + 9] with their own."""
        grids, saliency, merge = video_input["video_grid_thw"], {}, self.config.vision_config.spatial_merge_size
        if self.attention is not None:
            self.attention.armed = True
        (features,) = super()._process_video_input(video_input)  # type: ignore[misc]
        if self.attention is not None:
            self.attention.armed = False
            saliency = {"saliency.head": self.attention.saliency(int(grids[0, 0]), merge**2)}
        (video,) = self.patch.encoded(self, {"video_grid_thw": grids.cpu()}, saliency)
        signals = {name: s.flatten() for name, s in video.signals.items()}
        kept, places = shortened(self.serving.method, features, video.grid, signals)
        if self.serving.method.positions != "keep":
            return kept
        own = positions.of_grid(video.grid, seconds).to(kept.device)
        return torch.cat([kept, positions.packed(own[:, places], kept.dtype)], 1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """[3, N] and what to add behind the prompt; right for all text before any video is encoded."""
        if self.serving.method.positions != "keep":
            return positions.renumbered(len(input_tokens))
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        grids = self.iter_mm_grid_thw(mm_features)  # type: ignore[attr-defined]
        media = [
            Medium(offset, feature.mm_position.length, (t, h, w), seconds)
            for feature, (offset, t, h, w, seconds) in zip(features, grids, strict=True)
        ]
        return positions.of_prompt(len(input_tokens), media)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """The features without what travelled with them, positions [3, N], and what to add behind the prompt."""
        width = self.config.get_text_config().hidden_size
        if multimodal_embeddings:  # not so while an answer is written
            ids = torch.as_tensor(input_ids, device=mrope_positions.device)
            media = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
            mrope_positions = positions.placed(
                mrope_positions, media, multimodal_embeddings, num_computed_tokens, width
            )
        behind = int(mrope_positions.max()) + 1 - mrope_positions.shape[1]
        return [e[:, :width] for e in multimodal_embeddings], mrope_positions, behind


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLCounting, info=qwen2_vl.Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummies
)
class VidcompressQwen2VL(QwenReducing, qwen2_vl.Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLCounting, info=qwen2_5_vl.Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen25VLDummies
)
class VidcompressQwen25VL(QwenReducing, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""
