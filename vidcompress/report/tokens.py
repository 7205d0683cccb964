"""What became of every token of a video, stage by stage, read from its recorded steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidcompress.tokens import Grid, Reduction
from vidcompress.trace import Step

KEPT, MERGED, DROPPED = "kept", "merged", "dropped"
FATES = (KEPT, MERGED, DROPPED)


@dataclass(frozen=True)
class TokenMap:
    """The N = t * h * w tokens of one video on their way through S stages, those steps that changed anything.

    A token is kept while its place is in the prompt, merged while its content lives on in kept tokens alone, and
    dropped from then on.

    Attributes:
        stages: the S steps, in the order in which they acted.
        place: [N] after how many stages the token still has its place.
        content: [N] after how many stages its content is still there, at least `place`.
        merges: for every stage (survivor, source, weight), [E] each, in places of the grid: what its survivors were
            mixed from. A survivor that is not named went on as it was.
    """

    grid: Grid
    stages: tuple[Step, ...]
    place: Tensor
    content: Tensor
    merges: tuple[tuple[Tensor, Tensor, Tensor], ...]

    @classmethod
    def of(cls, steps: Sequence[Step]) -> TokenMap:
        """Follows the steps of one video.

        Raises ValueError if there are none, or they belong to several videos or do not follow each other.
        """
        if not steps:
            raise ValueError("nothing is recorded of this video: it was not compressed, so there is nothing to draw")
        if len({(s.row, s.video) for s in steps}) > 1:
            raise ValueError("these steps belong to several videos; give those of one")
        grid = steps[0].grid
        total = Reduction.identity(steps[0].before)
        place = torch.zeros(len(total), dtype=torch.long)
        content, merges = place.clone(), []
        stages = tuple(step for step in steps if not step.reduction.is_identity)
        for number, step in enumerate(stages, 1):
            reduction = _on_cpu(step.reduction)
            merges.append(_mixed(reduction, total.keep))
            total = total.then(reduction)
            place[total.keep] = content[total.keep] = number
            if total.slot is not None:
                assert total.source is not None and total.weight is not None
                content[total.source[total.weight != 0]] = number
        return cls(grid, stages, place, content, tuple(merges))

    def fate(self, stage: int) -> Tensor:
        """[N] after `stage` stages: 0 kept, 1 merged, 2 dropped."""
        return (self.place < stage).long() + (self.content < stage).long()

    def counts(self, stage: int) -> Tensor:
        """[t, 3]: tokens kept, merged and dropped of every frame after `stage` stages."""
        fate = self.fate(stage).view(self.grid[0], -1)
        return torch.stack([(fate == i).sum(1) for i in range(len(FATES))], 1)

    def sources(self, token: int, stage: int) -> dict[int, float]:
        """What a token that is kept after `stage` stages was mixed from: weights by place in the grid."""
        if stage == 0:
            return {token: 1.0}
        survivor, source, weight = self.merges[stage - 1]
        mine = (survivor == token).nonzero().squeeze(1)
        parts = [(int(source[i]), float(weight[i])) for i in mine] or [(token, 1.0)]
        mixed: dict[int, float] = {}
        for part, share in parts:
            for origin, w in self.sources(part, stage - 1).items():
                mixed[origin] = mixed.get(origin, 0.0) + share * w
        return {origin: w for origin, w in mixed.items() if w}


def _on_cpu(reduction: Reduction) -> Reduction:
    slot, source, weight = (
        None if x is None else x.cpu() for x in (reduction.slot, reduction.source, reduction.weight)
    )
    return replace(reduction, keep=reduction.keep.cpu(), slot=slot, source=source, weight=weight)


def _mixed(reduction: Reduction, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The triplets of a stage whose tokens lie at `index` in the grid."""
    if reduction.slot is None:
        return index[:0], index[:0], torch.zeros(0)
    assert reduction.source is not None and reduction.weight is not None
    order = reduction.slot.argsort(stable=True)
    slot, source, weight = reduction.slot[order], reduction.source[order], reduction.weight[order].float()
    return index[reduction.keep[slot]], index[source], weight
