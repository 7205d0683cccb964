"""Times whole prompts of real video-LLMs, random weights built in place: vision, compression, prefill, decoding.

    python scripts/bench_prefill.py                                     # one GPU, three 7B models; minutes
    python scripts/bench_prefill.py --models tiny --dtype float32       # two layers, any machine

Every row is the median of `--repeat` calls of `generate` in one process after a call that warms up; rounds of all rows
of a model are interleaved. `speed_up` is of the time to the first token without the vision encoder, which compression
does not shorten, so: prefill of the whole prompt over compression and prefill of the short one. `flops_ratio` is the
limit that the decoder's FLOPs set (Unified's formula, nothing decoded). Beside them stand the papers' own prefill
speed-ups, which were measured on other machines. Weights are random, so that answers mean nothing and times are real.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import vidcompress
from vidcompress.compat import ensure_torchvision

ensure_torchvision()  # looked for when transformers is imported

import transformers  # noqa: E402

from vidcompress.costs import Dimensions, dimensions, flops  # noqa: E402
from vidcompress.measure import Run, timed_generate  # noqa: E402
from vidcompress.method import Pipeline  # noqa: E402
from vidcompress.models.llava_video_config import SO400M, LlavaVideoConfig, placeholders, pooled_side  # noqa: E402
from vidcompress.profiling import device_at_hand, machine, save  # noqa: E402

PUBLISHED = {("infomerge", 0.15): 4.24, ("infomerge", 0.1): 6.67, ("infomerge", 0.05): 12.43, ("unified", 0.02): 22.0}
"""Prefill speed-ups that the two papers state for LLaVA-OneVision-7B."""


def decoder(name: str) -> dict[str, Any]:
    """Fields of a published model's Qwen2 config."""
    of = dimensions(name)
    return {
        "hidden_size": of.hidden,
        "intermediate_size": of.intermediate,
        "num_hidden_layers": of.layers,
        "num_attention_heads": of.heads,
        "num_key_value_heads": of.kv_heads,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
    }


TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 4096,
}
TINY_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def llava(text: dict[str, Any], tower: dict[str, Any], video: bool = False) -> Any:
    """Config of LLaVA-OneVision, or of LLaVA-Video."""
    vocabulary = text["vocab_size"]
    fields = {
        "text_config": {"model_type": "qwen2", **text},
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **tower},
        "image_token_index": vocabulary - 2,
        "video_token_index": vocabulary - 1,
    }
    if not video:
        return transformers.LlavaOnevisionConfig(**fields)
    return LlavaVideoConfig(**fields, mm_spatial_pool_mode="average", mm_newline_position="grid")


def qwen2_vl(text: dict[str, Any], side: int = 1280, depth: int = 32) -> Any:
    """Config of Qwen2-VL."""
    vocabulary = text["vocab_size"]
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return transformers.Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={"embed_dim": side, "depth": depth, "num_heads": side // 80, "hidden_size": text["hidden_size"]},
        image_token_id=vocabulary - 2,
        video_token_id=vocabulary - 1,
        vision_start_token_id=vocabulary - 4,
        vision_end_token_id=vocabulary - 3,
    )


MODELS: dict[str, Callable[[], Any]] = {
    "llava-onevision-7b": lambda: llava(decoder("llava-onevision-7b"), SO400M),
    "llava-video-7b": lambda: llava(decoder("llava-video-7b"), SO400M, video=True),
    "qwen2-vl-7b": lambda: qwen2_vl(decoder("qwen2-vl-7b")),
    "tiny": lambda: llava(TINY_TEXT, TINY_TOWER),
    "tiny-video": lambda: llava(TINY_TEXT, TINY_TOWER, video=True),
    "tiny-qwen": lambda: qwen2_vl(TINY_TEXT, 160, 2),
}


def build(config: Any, dtype: torch.dtype, device: torch.device, attn: str) -> Any:
    """The model with random weights, made where it stays."""
    from vidcompress.models import register

    register()
    with device:
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attn)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompt(model: Any, frames: int, text: int, batch: int) -> dict[str, Any]:
    """A video of shots of eight frames, then text, for every row of the batch."""
    config, device = model.config, model.device
    draw = torch.Generator().manual_seed(0)
    shot = torch.arange(frames) // 8
    if config.model_type.startswith("qwen"):
        vision = config.vision_config
        merge, patch = vision.spatial_merge_size, vision.patch_size
        h = w = 8 if vision.depth < 8 else 28
        channels = vision.in_channels * vision.temporal_patch_size * patch**2
        steps = frames // vision.temporal_patch_size
        scenes = torch.randn(int(shot[-1]) + 1, h * w, channels, generator=draw)
        pixels = scenes[shot[:: vision.temporal_patch_size]]
        pixels = pixels + 0.2 * torch.randn(pixels.shape, generator=draw)
        given: dict[str, Any] = {
            "pixel_values_videos": pixels.flatten(0, 1).repeat(batch, 1).to(device, model.dtype),
            "video_grid_thw": torch.tensor([[steps, h, w]] * batch, device=device),
        }
        places = steps * h * w // merge**2
        start, end = [config.vision_start_token_id], [config.vision_end_token_id]
    else:
        size = config.vision_config.image_size
        scenes = torch.randn(int(shot[-1]) + 1, 3, size, size, generator=draw)
        pixels = scenes[shot] + 0.2 * torch.randn(frames, 3, size, size, generator=draw)
        given = {"pixel_values_videos": pixels[None].repeat(batch, 1, 1, 1, 1).to(device, model.dtype)}
        places, start, end = _places(config, frames), [], []
    video = getattr(config, "video_token_id", None) or config.video_token_index
    row = [5, *start, *[video] * places, *end, *range(6, 6 + text)]
    ids = torch.tensor([row] * batch, device=device)
    given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.model_type.startswith("qwen"):
        given["mm_token_type_ids"] = 2 * (ids == video).int()
    return given


def _places(config: Any, frames: int) -> int:
    """Placeholders of a LLaVA video."""
    if isinstance(config, LlavaVideoConfig):
        return placeholders(frames, config.frame_side(), config.mm_newline_position)
    side = config.vision_config.image_size // config.vision_config.patch_size
    return placeholders(frames, pooled_side(side, "bilinear"), "one_token")


@contextlib.contextmanager
def compressed(model: Any, method: str | None, ratio: float) -> Iterator[None]:
    """The model with that method for a while, or as it is."""
    if method is None:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*takes its saliency from SigLIP's pooling head", UserWarning)
        with vidcompress.apply(model, method, retention_ratio=ratio):
            yield


def measure(model: Any, inputs: dict[str, Any], rows: list[tuple[str | None, float]], options: Any) -> list[list[Run]]:
    """`--repeat` runs of every row, interleaved, after one that warms up."""
    seen: list[list[Run]] = [[] for _ in rows]
    for round_ in range(options.repeat + 1):
        for (method, ratio), runs in zip(rows, seen, strict=True):
            with compressed(model, method, ratio), torch.no_grad():
                run = timed_generate(model, inputs, options.new_tokens)
            if round_:
                runs.append(run)
    return seen


def summary(model: Any, rows: list[tuple[str | None, float]], seen: list[list[Run]]) -> Iterator[dict[str, Any]]:
    """One line a row: medians, and what they are relative to the uncompressed first row."""

    def median(runs: list[Run], name: str) -> float | None:
        values = [getattr(run, name) for run in runs]
        return None if None in values else statistics.median(values)

    text = Dimensions.of(model.config)
    whole = median(seen[0], "prefill_ms")
    for (method, ratio), runs in zip(rows, seen, strict=True):
        found = {
            name: median(runs, name)
            for name in ("vision_ms", "compression_ms", "prefill_ms", "first_token_ms", "decode_tokens_per_second")
        }
        found |= {name: median(runs, name) for name in ("kv_cache_mb", "peak_memory_mb")}
        record = runs[0].record
        spent = [run.compression_ms + run.prefill_ms for run in runs]
        line: dict[str, Any] = {"method": method or "none", "retention_ratio": ratio}
        line["prompt"] = len(runs[0].sequences[0]) if record is None else record.length_after
        line |= {name: None if value is None else round(value, 2) for name, value in found.items()}
        line["spread_ms"] = f"{min(spent):.1f} to {max(spent):.1f}"
        line["speed_up"] = round((whole or 0.0) / statistics.median(spent), 2)
        line["flops_ratio"] = None if method is None else round(_flops_ratio(text, record), 2)
        known = type(model).__name__.startswith("LlavaOnevision")
        line["published"] = PUBLISHED.get((method or "", ratio)) if known else None
        yield line


def _flops_ratio(text: Dimensions, record: Any) -> float:
    """Decoder FLOPs of the whole prompt over those of the lengths that its layers ran over."""
    before = [record.length_before] * text.layers
    lengths = record.layer_lengths if len(record.layer_lengths) == text.layers else [record.length_after] * text.layers
    return sum(flops("unified", text, before, 0)) / sum(flops("unified", text, lengths, 0))


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Prints a table, writes JSON if told where, and returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llava-onevision-7b,llava-video-7b,qwen2-vl-7b", help=", ".join(MODELS))
    parser.add_argument("--methods", default="infomerge,fastvid,unified,hieravid")
    parser.add_argument("--retention", default="0.3,0.15,0.1,0.05,0.02,0.01")
    parser.add_argument("--attn", default="sdpa", help="sdpa, flash_attention_2 or both, by comma")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--text", type=int, default=50, help="text tokens after the video")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    device = device_at_hand()
    unknown = [name for name in options.models.split(",") if name not in MODELS]
    if unknown:
        parser.error(f"--models: {', '.join(unknown)} unknown; accepted: {', '.join(MODELS)}")
    ratios = [float(ratio) for ratio in options.retention.split(",")]
    rows: list[tuple[str | None, float]] = [(None, 1.0)]
    rows += [(method, ratio) for method in options.methods.split(",") for ratio in ratios if _takes(method, ratio)]
    about = machine() | {"transformers": transformers.__version__}
    about |= {"dtype": options.dtype, "frames": options.frames, "text": options.text, "weights": "random"}
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    lines: list[dict[str, Any]] = []
    for name in options.models.split(","):
        for attn in options.attn.split(","):
            if attn == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
                print(f"{name}: flash_attention_2 left out, the package flash_attn is not installed")
                continue
            model = build(MODELS[name](), getattr(torch, options.dtype), device, attn)
            for batch in (int(b) for b in options.batch.split(",")):
                inputs = prompt(model, options.frames, options.text, batch)
                for line in summary(model, rows, measure(model, inputs, rows, options)):
                    lines.append({"model": name, "attn": attn, "batch": batch, **line})
                    if len(lines) == 1:
                        print("  ".join(f"{k:<{_width(k)}}" for k in lines[0]))
                    print("  ".join(f"{'-' if v is None else v!s:<{_width(k)}}" for k, v in lines[-1].items()))
            del model
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if options.out:
        save({**about, "rows": lines}, options.out)
    return lines


def _width(column: str) -> int:
    return max(len(column), 18 if column in ("model", "spread_ms") else 10)


def _takes(method: str, ratio: float) -> bool:
    """Whether a method accepts a ratio (PyramidDrop's has a lower bound). An unknown method is an error."""
    try:
        Pipeline.of(vidcompress.load(method, retention_ratio=ratio))
    except ValueError as error:
        if "retention_ratio" not in str(error):
            raise
        print(f"{method}: {error}")
        return False
    return True


if __name__ == "__main__":
    main()
