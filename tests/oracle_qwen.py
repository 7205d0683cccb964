"""`oracle` for models with M-RoPE: how a Qwen reads a prompt. All that follows is `oracle`'s."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from oracle import Inputs, Said, Video
from tiny import IMAGE, VIDEO
from torch import Tensor


def row(inputs: Inputs, b: int) -> dict[str, Tensor]:
    """Row b alone: without its padding, with its own videos and images."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    alone = {key: inputs[key][b, mask[b]][None] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
    for token, pixels, grids in (
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
        (IMAGE, "pixel_values", "image_grid_thw"),
    ):
        if grids in inputs:
            ends = (inputs[grids].prod(1) // 4).cumsum(0)
            places = (ids == token).sum(1)
            first, last = places[:b].sum(), places[: b + 1].sum()
            mine = (ends > first) & (ends <= last)
            if mine.any():
                alone[grids] = inputs[grids][mine]
                alone[pixels] = inputs[pixels][4 * first : 4 * last]
    return alone


def reading(prompt: int | None = None, decoded: int = 0, delta: int | None = None) -> Callable[..., Said]:
    """How a prompt is read; pass it as `read`.

    Args:
        prompt: columns of the first turn, whose videos say what is added to the positions of later turns; all of them
            by default.
        decoded: how many tokens behind it generate() has written into the cache itself: it numbers them one by one.
        delta: what is added to the columns behind these; by default what the prompt says.
    """
    return functools.partial(read, prompt=prompt, decoded=decoded, delta=delta)


def read(
    model: Any,
    inputs: Inputs,
    signals: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    prompt: int | None = None,
    decoded: int = 0,
    delta: int | None = None,
) -> Said:
    """The whole prompt with its features in place, positions of three axes, and deepstack features."""
    base, ids = model.model, inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    added = [torch.zeros_like(embeds[0]) for _ in getattr(base.visual, "deepstack_visual_indexes", ())]
    videos: list[Video] = []
    for token, encode, names in (
        (IMAGE, base.get_image_features, ("pixel_values", "image_grid_thw")),
        (VIDEO, base.get_video_features, ("pixel_values_videos", "video_grid_thw")),
    ):
        if names[0] in inputs:
            encoded = encode(*(inputs[name] for name in names), return_dict=True)
            where = ids[0] == token
            embeds = embeds.masked_scatter(where[None, :, None], torch.cat(encoded.pooler_output))
            for layer, features in enumerate(getattr(encoded, "deepstack_features", ())):
                # one tensor a layer before transformers 5.18, later one for every video
                whole = features if torch.is_tensor(features) else torch.cat(features)
                added[layer] = added[layer].masked_scatter(where[:, None], whole)
            if token == VIDEO:
                videos = find_videos(model, inputs, encoded.pooler_output, where.nonzero().squeeze(1), signals)
    return Said(embeds, positions(model, inputs, prompt, decoded, delta), videos, tuple(added))


def find_videos(
    model: Any,
    inputs: Inputs,
    features: Sequence[Tensor],
    columns: Tensor,
    signals: Sequence[Mapping[str, Tensor]] | None,
) -> list[Video]:
    """The videos of a prompt, in order, nothing decided.

    Args:
        features: of every video, [M, C].
        columns: of all of them; those of one video need not be a run.
    """
    grids = [(t, h // 2, w // 2) for t, h, w in inputs["video_grid_thw"].tolist()]
    if signals is None:
        means = [f.detach().unflatten(0, (g[0], -1)).mean(1) for f, g in zip(features, grids)]
        signals = [dict(s, frame_features=m) for s, m in zip(tower_signals(model, inputs), means)]
    places = columns.split([len(f) for f in features])
    return [Video(*video) for video in zip(places, grids, signals, strict=True)]


def positions(model: Any, inputs: Inputs, prompt: int | None, decoded: int, delta: int | None) -> Tensor:
    """[3, 1, L + 1] positions of every token, and of the one that generate() writes next."""
    ids = inputs["input_ids"]
    length = ids.shape[1]
    end = length if prompt is None else prompt
    grids = {key: inputs[key] for key in ("image_grid_thw", "video_grid_thw") if key in inputs}
    if not grids:
        return torch.arange(length + 1).expand(3, 1, -1)
    first, own = model.model.get_rope_index(ids[:, :end], inputs["mm_token_type_ids"][:, :end], **grids)
    column = torch.arange(end, length)
    later = torch.where(
        column < end + decoded, first[..., -1:] + 1 + column - end, column + (own if delta is None else delta)
    )
    said = torch.cat([first, later], -1)
    return torch.cat([said, said[..., -1:] + 1], -1)


@torch.no_grad()
def tower_signals(model: Any, inputs: Inputs) -> list[dict[str, Tensor]]:
    """Saliency of every video, each alone, from the full attention of the tower's last block that sees whole frames.

    A token is four patches: `received` is the mean of their column means, `head` the attention that a frame's mean
    query pays to the token's mean key, `tower_keys` the mean of their keys over the heads.
    """
    tower = copy.deepcopy(model.model.visual)
    number = max(getattr(tower, "fullatt_block_indexes", [len(tower.blocks) - 1]))
    block, found = tower.blocks[number], []
    seen: list[Any] = []
    block.attn.forward = lambda *args, **kwargs: seen.append((args, kwargs)) or _stop()
    grids = inputs["video_grid_thw"]
    pixels = inputs["pixel_values_videos"].split(grids.prod(1).tolist())
    for grid, values in zip(grids, pixels, strict=True):
        try:
            tower(values, grid_thw=grid[None])
        except _Stop:
            pass
        args, kwargs = seen.pop()
        order = torch.arange(int(grid.prod()) // 4)
        if hasattr(tower, "permute_input_for_window_attn"):
            order = window_order(grid.tolist(), model.config.vision_config)
        found.append(_saliency(block.attn, args[0], kwargs["position_embeddings"], int(grid[0]), order.argsort()))
    return found


class _Stop(Exception):
    pass


def _stop() -> None:
    raise _Stop


def window_order(grid: Sequence[int], config: Any) -> Tensor:
    """[M] the tokens of a video as the tower takes them: window by window, row by row, frame by frame."""
    t, h, w = grid[0], grid[1] // 2, grid[2] // 2
    side = config.window_size // config.patch_size // 2
    frame, y, x = torch.meshgrid(*(torch.arange(n) for n in (t, h, w)), indexing="ij")
    key = ((((frame * h + y // side) * w + x // side) * side + y % side) * side) + x % side
    return key.flatten().argsort()


def _saliency(attn: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], frames: int, back: Tensor) -> dict[str, Tensor]:
    query, key, _ = attn.qkv(hidden).unflatten(-1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)  # [H, patches, D]
    query, key = (x * rotary[0] + _half_turn(x) * rotary[1] for x in (query, key))
    received, head = [], []
    for q, k in zip(query.chunk(frames, 1), key.chunk(frames, 1)):
        weights = (q @ k.transpose(1, 2) * attn.scaling).softmax(-1)
        received.append(weights.mean((0, 1)).view(-1, 4).mean(1))
        pooled = k.unflatten(1, (-1, 4)).mean(2)
        head.append((pooled @ q.mean(1)[..., None] * attn.scaling)[..., 0].softmax(-1).mean(0))
    keys = attn.qkv(hidden).chunk(3, -1)[1]  # before rotation
    keys = torch.stack(keys.chunk(attn.num_heads, -1)).mean(0).view(-1, 4, keys.shape[-1] // attn.num_heads).mean(1)
    return {
        "saliency.received": torch.cat(received)[back],
        "saliency.head": torch.cat(head)[back],
        "tower_keys": keys[back],
    }


def _half_turn(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)
