"""One video on its way from a server's encoder to its LLM."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from vidcompress.engine.saliency import mean_tokens
from vidcompress.method import Method
from vidcompress.tokens import Grid, Reduction, Site, VideoTokens

logger = logging.getLogger("vllm.plugins.vidcompress")  # below vLLM's own, so that its handlers take it


def shortened(method: Method, features: Tensor, grid: Grid, signals: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the method keeps of one video.

    A video whose values are not finite must not stop the server, which answers others at the same time: evenly spread
    tokens are kept of it, and an error is logged.

    Args:
        features: [M, C] as the LLM would get them.
        grid: (t, h, w), M = t * h * w.
        signals: of the tower, by name: `frame_features` [t, F] (the mean tokens if it is missing), saliency [M].

    Returns:
        [K, C] tokens, merged where the method merges, and [K] the place in the grid of each; K = `budget(grid)`.
    """
    if "frame_features" in method.needs and "frame_features" not in signals:
        signals = {**signals, "frame_features": mean_tokens(features, grid[0])}
    signals = {name: signals[name] for name in method.needs}
    if not torch.stack([value.isfinite().all() for value in (features, *signals.values())]).all():
        logger.error("a video of %s tokens holds NaN or inf: evenly spread tokens are kept of it", len(features))
        count = method.budget(grid)
        reduction = Reduction(torch.arange(count, device=features.device) * len(features) // count, len(features))
    else:
        reduction = method.decide(VideoTokens(features, grid, None, signals), Site.projector())
    return reduction.apply(features), reduction.keep
