from __future__ import annotations

import torch
from torch import Tensor


def segment_frames(frame_features: Tensor, min_segments: int, threshold: float) -> list[tuple[int, int]]:
    """Cuts a video at its least similar neighbouring frames (FastVID's DySeg; InfoMerge, eq. 22-23).

    A boundary lies after frame i if cos(f_i, f_i+1) is among the `min_segments - 1` smallest or below `threshold`.

    Args:
        frame_features: [t, F], one vector a frame.
        min_segments: least number of segments; a video of fewer frames is cut between all of them.
        threshold: a cosine; strictly smaller ones are cut.

    Returns:
        [(start, end), ...] in order, end exclusive, covering all frames.
    """
    f = frame_features.cpu().double()  # a few vectors; the host has to know the cuts before anything else can begin
    t = f.shape[0]
    unit = f / f.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(f.dtype).tiny)
    # Frozen frames are exactly 1 alike, so that rounding does not rank them.
    frozen = (f[1:] == f[:-1]).all(-1) & f[1:].any(-1)
    similarity = (unit[1:] * unit[:-1]).sum(-1).clamp(max=1).masked_fill(frozen, 1.0)  # [t - 1]
    cut = similarity < threshold
    cut[similarity.argsort(stable=True)[: min(min_segments - 1, t - 1)]] = True
    starts = [0, *(cut.nonzero().squeeze(1) + 1).tolist()]
    return list(zip(starts, [*starts[1:], t], strict=True))
