"""Density peaks by Triton: frames by their matrices of distances, long rows by a search that writes none down.

Decisions are those of naive.py. As in tiled.py a bound on the rounding says which tokens can be among the nearest;
these are measured in fp64, and what the bound leaves open is searched around a leader.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidcompress.ops.density_peaks import tiled
from vidcompress.ops.density_peaks import torch as fast
from vidcompress.ops.density_peaks.kernel_frames import frame_scores
from vidcompress.ops.density_peaks.kernel_row import row_scores
from vidcompress.ops.density_peaks.kernel_search import ROUNDING, lengths, search
from vidcompress.ops.launch import INTERPRETED, launch, rows_contiguous
from vidcompress.ops.table import table

MOST_KEPT = 32
"""Longest list of neighbours that fits into registers; longer ones are left to tiled.py."""

ROWS = 256 if INTERPRETED else 8
"""Lists of a program: the interpreter takes as long for few as for many."""


def density_peaks(
    tokens: Tensor,
    candidates: Tensor,
    neighbours: int,
    ties: Literal["index", "strict"] = "index",
    noise: Tensor | None = None,
) -> Tensor:
    if tokens.shape[1] <= fast.TILED_ABOVE or not len(tokens):
        return frame_scores(tokens, candidates, neighbours, ties, noise)
    scores: list[Tensor] = []
    for b, (x, own) in enumerate(zip(rows_contiguous(tokens), candidates, strict=True)):
        extra = None if noise is None else noise[b]
        straight = extra is None and neighbours + tiled.SPARE <= MOST_KEPT
        score = row_scores(x, own, neighbours, ties) if straight else None
        scores.append(tiled.tiled_scores(x, own, neighbours, ties, extra, Points) if score is None else score)
    return torch.stack(scores) if len(scores) > 1 else scores[0][None]


class Points(tiled.Points):
    """Tokens whose distances are a kernel's."""

    def middle(self) -> Tensor | None:
        """Half-precision tokens stay where they are, unless most of their length is their common mean."""
        if self.tokens.dtype in (torch.float32, torch.float64):
            return super().middle()
        some = self.tokens[self.index[:: max(1, len(self.index) // tiled.TILE)]].double()
        middle = some.mean(0)
        is_short = middle.norm() <= some.norm() * (0.8 / len(some)) ** 0.5
        return None if is_short else middle

    def noise(self, square: Tensor, distance: Tensor) -> Tensor:
        return ROUNDING * super().noise(square, distance)

    def scan(self, rows: Tensor, columns: Tensor | None, origin: Tensor | None, kept: int) -> tiled.Near:
        if kept > MOST_KEPT:  # never fewer where there are fewer columns: every number is a kernel of its own
            return super().scan(rows, columns, origin, kept)
        rows = rows.contiguous()
        across = rows if columns is None else columns.contiguous()
        shift = origin
        if shift is not None and self.tokens.dtype != torch.float64:
            shift = shift.float()
        square = lengths(self.tokens, self.index, across, shift)
        own = square if columns is None else lengths(self.tokens, self.index, rows, shift)
        counts = table([len(rows), len(across)], rows.device)
        found = search(self.tokens, self.index, rows, own, self.below, across, square, (shift, None), counts, kept)
        near = self._joined(*found, own, kept, len(across))
        if columns is not None:
            near.farthest.zero_()
        return near

    def _joined(
        self, distance: Tensor, point: Tensor, farthest: Tensor, square: Tensor, kept: int, columns: int
    ) -> tiled.Near:
        """One list a row from several, and what lies beyond it; all are listed if there are no more than `kept`."""
        count, width = len(distance), distance.shape[1] * distance.shape[2]
        near = tiled.Near(
            distance.new_empty(count, kept), torch.empty(count, kept, dtype=torch.long, device=point.device), square,
            torch.empty_like(square), torch.empty_like(square),
        )  # fmt: skip
        launch(
            _join, (triton.cdiv(count, ROWS),), distance, point, farthest, square,
            near.distance, near.point, near.reach, near.farthest, count, width, distance.shape[1],
            ROUNDING * tiled.NOISE * float(self.tokens.shape[1]) ** 0.5,
            KEPT=kept, ALL=kept >= columns, R=ROWS, W=triton.next_power_of_2(width),
            S=triton.next_power_of_2(distance.shape[1]), num_warps=4,
        )  # fmt: skip
        return near


@triton.jit
def _join(
    distance, point, farthest, square, to_distance, to_point, reach, to_farthest, count, width, splits, unit,
    KEPT: tl.constexpr, ALL: tl.constexpr, R: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    i, j, s = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, W), tl.arange(0, S)
    inside = (i < count)[:, None] & (j < width)[None, :]
    row = tl.load(distance + i[:, None] * width + j[None, :], mask=inside, other=float("inf"))
    least = tl.min(row, 1)
    for k in range(KEPT):
        least = tl.min(row, 1)
        place = tl.min(tl.where(row == least[:, None], j[None, :], W), 1)
        who = tl.load(point + i * width + place, mask=(i < count) & (least < float("inf")), other=0)
        tl.store(to_distance + i * KEPT + k, least, mask=i < count)
        tl.store(to_point + i * KEPT + k, who.to(tl.int64), mask=i < count)
        row = tl.where(j[None, :] == place[:, None], float("inf"), row)
    beyond = tl.full((R,), float("inf"), tl.float32)
    if not ALL:
        own = tl.load(square + i, mask=i < count, other=0.0)
        beyond = tl.where(least < float("inf"), least - unit * (3 * own + 2 * least), beyond)
    tl.store(reach + i, beyond, mask=i < count)
    inside = (i < count)[:, None] & (s < splits)[None, :]
    most = tl.max(tl.load(farthest + i[:, None] * splits + s[None, :], mask=inside, other=0.0), 1)
    tl.store(to_farthest + i, most, mask=i < count)
