from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def density_peaks(
    tokens: Tensor,
    candidates: Tensor,
    neighbours: int,
    ties: Literal["index", "strict"] = "index",
    noise: Tensor | None = None,
) -> Tensor:
    out = torch.full(candidates.shape, -torch.inf, dtype=torch.float32, device=tokens.device)
    for b in range(tokens.shape[0]):
        points = candidates[b].nonzero().squeeze(1)
        x = tokens[b, points].double()
        if not len(points):
            continue
        distance = (x[:, None] - x[None]).norm(dim=-1) / x.shape[-1] ** 0.5  # [m, m]
        k = min(neighbours, len(points))
        log_density = -(distance**2).sort(-1).values[:, :k].mean(-1)  # [m]
        if noise is not None:
            log_density = (log_density.exp() + noise[b, points]).log()
        denser = log_density[None] > log_density[:, None]  # [m, m] denser[i, j]: j is denser than i
        if ties == "index":
            earlier = torch.ones_like(denser).tril(-1)
            denser |= (log_density[None] == log_density[:, None]) & earlier
        delta = distance.masked_fill(~denser, torch.inf).amin(-1)
        delta = torch.where(delta.isinf(), distance.max(), delta)
        out[b, points] = (log_density + delta.log()).float().clamp_min(torch.finfo(torch.float32).min)
    return out
