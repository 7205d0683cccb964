"""Prompts of the `llava` package: ids with -200 where an image or a video goes, made into embeddings by the model.

`prepare_inputs_labels_for_multimodal` is the one place where both can be seen, and all that follows of a prompt.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidcompress.engine.overrides import Override
from vidcompress.engine.plan import Pending

if TYPE_CHECKING:
    from vidcompress.patches.base import EncodedVideo

PLACEHOLDER = -200


def kinds(arguments: Mapping[str, Any]) -> list[str]:
    """ "video" or "image" for every item of `images`, from a call of `prepare_inputs_labels_for_multimodal`."""
    images, given = arguments["images"], arguments.get("modalities", ["image"])
    if torch.is_tensor(images) and images.ndim != 5:
        return ["image"] * len(images)  # whatever the modalities: the package pools nothing then
    given = [given] if isinstance(given, str) else list(given)
    return [given[i] if i < len(given) else "image" for i in range(len(images))]


class PreparePrompt(Override):
    """Notes where the videos of a prompt come to stand, as its embeddings are built."""

    method = "prepare_inputs_labels_for_multimodal"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.__signature__.bind(*args, **kwargs).arguments
        images, ids = arguments.get("images"), arguments["input_ids"]
        self.engine.local.pending = None
        if images is None or ids.shape[1] == 1 or "video" not in kinds(arguments):
            return self.original(*args, **kwargs)
        output, encoding = self.engine.record(arguments, lambda: self.original(*args, **kwargs))
        where, others = self._places(arguments, encoding.videos, output)
        self.engine.local.pending = Pending(where, others, encoding, sys.maxsize)
        return output

    def _places(
        self, arguments: Mapping[str, Any], videos: list[EncodedVideo], output: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        """([B, L] bool, [B, L] bool): the columns of the videos and of the images in the embedded prompt.

        Raises ValueError if the package cut the prompt, or where an image lies cannot be told.
        """
        ids, given, embeds = arguments["input_ids"], arguments.get("attention_mask"), output[4]
        config = self.owner.config
        where = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        images = where.clone()
        items, lengths = iter(kinds(arguments)), iter(v.placeholders for v in videos)
        for row, mine in enumerate(ids):
            mine = mine if given is None else mine[given[row].bool()]
            starts = (mine == PLACEHOLDER).nonzero().squeeze(1).tolist()
            spans = self._spans(row, len(starts), items, lengths)
            if spans.count(None) == len(spans):
                continue
            total = len(mine) - len(starts) + sum(span or 0 for span in spans)
            if None in spans:
                if spans.count(None) > 1:
                    raise ValueError("a prompt with a video holds several images; give at most one image beside videos")
                spans[spans.index(None)] = total - self._row_length(row, output)
                total = self._row_length(row, output)
            if total > embeds.shape[1]:
                raise ValueError(
                    f"the prompt of row {row} has {total} tokens and was cut to {embeds.shape[1]} "
                    f"(tokenizer_model_max_length); a video must be whole"
                )
            left = getattr(config, "tokenizer_padding_side", "right") == "left"
            column, before = embeds.shape[1] - total if left else 0, 0
            for start, span in zip(starts, spans, strict=True):
                assert span is not None
                column, before = column + start - before, start + 1
                (images if span < 0 else where)[row, column : column + abs(span)] = True
                column += abs(span)
        return where, images

    def _spans(self, row: int, places: int, items: Iterator[str], lengths: Iterator[int]) -> list[int | None]:
        """Tokens of the videos that go to the places of a row; None for an image."""
        mine = list(itertools.islice(items, max(1, places)))  # the package gives a row without any a dummy
        if not places and "video" in mine:
            raise ValueError(f"row {row} holds no video, and its dummy in `images` is one; give it an image as dummy")
        if len(mine) < places:
            raise ValueError(
                f"row {row} has {places} placeholders for images and videos, and `images` holds {len(mine)} for it"
            )
        return [next(lengths) if kind == "video" else None for kind in mine[:places]]

    def _row_length(self, row: int, output: tuple[Any, ...]) -> int:
        """Tokens of a row of the embedded prompt, of which an image makes known no length of its own."""
        mask, embeds = output[2], output[4]
        if mask is None and len(embeds) > 1:
            raise ValueError("several prompts with images beside videos need an attention_mask")
        length = embeds.shape[1] if mask is None else int(mask[row].sum())
        if length == getattr(self.owner.config, "tokenizer_model_max_length", None):
            raise ValueError(
                f"the prompt of row {row} fills all {length} places (tokenizer_model_max_length) and may have been "
                "cut; a video beside an image must leave a place free"
            )
        return length


class FreshGenerate(Override):
    """A prompt that was prepared and failed must not be taken for the next one."""

    method = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.engine.local.pending = None
        try:
            return self.original(*args, **kwargs)
        finally:
            self.engine.local.pending = None
