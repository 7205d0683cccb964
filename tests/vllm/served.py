"""Engines of vLLM, what is asked of them, and vidcompress on transformers with the same weights for comparison."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import vidcompress
from vidcompress import patches
from vidcompress.method import Method
from vidcompress.serving.positions import Medium, of_prompt
from vidcompress.serving.settings import RESOLVED, resolve

STEPS = 8
RATE = 2.0  # frames a second
WORDS = "What happens?"


@dataclass
class Ask:
    """A prompt: `parts` are text, or clips (uint8 [T, H, W, 3]), or images (uint8 [H, W, 3])."""

    parts: Sequence[str | np.ndarray]

    @property
    def videos(self) -> list[np.ndarray]:
        return [part for part in self.parts if not isinstance(part, str) and part.ndim == 4]

    @property
    def images(self) -> list[np.ndarray]:
        return [part for part in self.parts if not isinstance(part, str) and part.ndim == 3]

    def text(self, kind: str) -> str:
        """The prompt as the chat template writes it."""
        places = checkpoints.places(kind)
        said = [
            part if isinstance(part, str) else places["video" if part.ndim == 4 else "image"] for part in self.parts
        ]
        return f"<|im_start|>user\n{''.join(said)}<|im_end|>\n<|im_start|>assistant\n"


def one(frames: int = 8, seed: int = 0, words: str = WORDS) -> Ask:
    """A video and a question."""
    return Ask([checkpoints.clip(frames, seed), words])


def metadata(video: np.ndarray) -> dict[str, Any]:
    frames = len(video)
    return {
        "fps": RATE,
        "total_num_frames": frames,
        "duration": frames / RATE,
        "frames_indices": list(range(frames)),
    }


@dataclass
class Served:
    """An engine, and the rotary positions of everything it computed ([N] or [3, N] a forward)."""

    kind: str
    engine: Any
    positions: list[Tensor] = field(default_factory=list)

    def prompt(self, ask: Ask) -> dict[str, Any]:
        from PIL import Image

        with_metadata = self.kind != "llava_onevision"
        data = {
            "video": [(v, {**metadata(v), "do_sample_frames": False}) if with_metadata else v for v in ask.videos],
            "image": [Image.fromarray(image) for image in ask.images],
        }
        return {"prompt": ask.text(self.kind), "multi_modal_data": {key: value for key, value in data.items() if value}}

    def answer(self, asks: Sequence[Ask], salt: str | None = None) -> list[tuple[int, list[int]]]:
        """(tokens of the prompt, greedy answer) of each, asked together. Prompts of other salts share no cache."""
        from vllm import SamplingParams

        self.positions.clear()
        prompts = [{**self.prompt(ask), **({"cache_salt": salt} if salt else {})} for ask in asks]
        greedy = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
        outputs = self.engine.generate(prompts, greedy, use_tqdm=False)
        self.cached = [output.num_cached_tokens for output in outputs]
        return [(len(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]

    @property
    def model(self) -> Any:
        core = self.engine.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner.model

    @contextmanager
    def serving(self, compression: Any) -> Iterator[None]:
        """Another method meanwhile, whose signals the engine's own one needs, too: starting an engine takes long."""
        model, config = self.model, self.engine.model_config.hf_config
        before, other = model.serving, resolve(compression, config)
        try:
            model.serving = other
            setattr(config, RESOLVED, other.to_dict())
            yield
        finally:
            model.serving = before
            setattr(config, RESOLVED, before.to_dict())


@contextmanager
def served(kind: str, checkpoint: Path, compression: Any = None, **options: Any) -> Iterator[Served]:
    """An engine in this process, in fp32."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "limit_mm_per_prompt": {"image": 2, "video": 2},
        "seed": 0,
    }
    if compression is not None:
        defaults["hf_overrides"] = {"vidcompress": compression}
    found = Served(kind, LLM(str(checkpoint), **defaults | options))
    if options.get("tensor_parallel_size", 1) == 1:

        def saw(module: Any, args: Any, kwargs: Any) -> None:
            found.positions.append(kwargs["positions"].clone())

        found.model.register_forward_pre_hook(saw, with_kwargs=True)
    try:
        yield found
    finally:
        found.engine.llm_engine.engine_core.shutdown()
        del found.engine
        cleanup_dist_env_and_memory()
        gc.collect()


class Local:
    """vidcompress on transformers: the same weights, frames and positions as a server's."""

    def __init__(self, kind: str, checkpoint: Path, compression: Any = None) -> None:
        self.kind, self.processor = kind, AutoProcessor.from_pretrained(checkpoint)
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.handle = None
        self.compress(compression)
        if kind != "llava_onevision":
            self.model.model.get_rope_index = self._rope_index

    def compress(self, compression: Any) -> None:
        """Uses this method from now on, with the positions that the server gives."""
        if self.handle is not None:
            self.handle.remove()
        self.handle = None
        if compression is not None:
            method = vidcompress.load(compression)
            assert isinstance(method, Method)
            if patches.find(self.model.config).rotary_axes == 1:
                method = replace(method, positions="renumber")
            self.handle = vidcompress.apply(self.model, method)

    def inputs(self, ask: Ask) -> Any:
        media: dict[str, Any] = {"images": ask.images} if ask.images else {}
        if ask.videos:
            media |= {"videos": ask.videos, "video_metadata": [metadata(v) for v in ask.videos]}
        return self.processor(text=[ask.text(self.kind)], **media, do_sample_frames=False, return_tensors="pt")

    def answer(self, ask: Ask) -> tuple[int, list[int]]:
        """(tokens that enter the LLM, greedy answer)."""
        inputs = self.inputs(ask)
        length = inputs["input_ids"].shape[1]
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids = self.model.generate(**inputs, **settings, max_new_tokens=STEPS)
        entered = length
        if self.handle is not None and ask.videos:
            last = self.handle.trace.last
            entered = last.length_after
        return entered, ids[0, length:].tolist()

    def _rope_index(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """After a video transformers 5 goes on at its rows or columns, transformers 4 and vLLM at its largest position
        plus one, as the models were trained."""
        positions, delta = of_prompt(input_ids.shape[1], self.media(input_ids[0], **kwargs))
        return positions[:, None], torch.tensor([[delta]])

    def media(self, ids: Tensor, **kwargs: Any) -> list[Medium]:
        """The images and videos of a prompt, none compressed."""
        config = self.model.config
        merge, found = config.vision_config.spatial_merge_size, []
        image, video = config.image_token_id, config.video_token_id
        grids = {image: kwargs.get("image_grid_thw"), video: kwargs.get("video_grid_thw")}
        rate = getattr(config.vision_config, "tokens_per_second", 1)
        times = kwargs.get("second_per_grid_ts")
        for token, each in grids.items():
            column = 0
            for i, (t, h, w) in enumerate([] if each is None else each.tolist()):
                column += int((ids[column:] == token).nonzero()[0])
                grid = (t, h // merge, w // merge)
                timed = token == video and times is not None
                count = t * (h // merge) * (w // merge)
                found.append(Medium(column, count, grid, rate * float(times[i]) if timed else 1.0))
                column += count
        return sorted(found, key=lambda medium: medium.offset)
