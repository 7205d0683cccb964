"""CDPruner: keep what is relevant to the text and unlike what is kept already (Zhang et al., NeurIPS 2025).

A determinantal point process over the cosines of the tokens, weighted by relevance; greedy MAP, frame by frame. The
code's relevance compares CLIP's patches with CLIP's text, which a video-LLM does not have. Here the tokens are compared
with the embeddings of the prompt's text, where both first meet: at the input of the decoder's first layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vidcompress import ops
from vidcompress.method import DEPTH, Method, setting
from vidcompress.tokens import Reduction, Site, VideoTokens


@dataclass(kw_only=True)
class CDPruner(Method):
    needs = frozenset({"text_hidden"})
    costly = "greedy MAP of every frame, in fp64, and all of the video compared with every word"

    relevant: Literal["like", "unlike"] = setting("like", "tokens that are relevant: like the text, or unlike it")
    eps: float = setting(1e-6, "added to the distance from the least relevance, which is not 0 then", low=0)
    layer: int = setting(0, "decoder layer at whose input it acts, counted from 0", low=0)

    def sites(self, depth: int = DEPTH) -> list[Site]:
        return [Site.decoder(self.layer)]

    def reduce(self, tokens: VideoTokens, site: Site) -> Reduction:
        t, h, w = tokens.grid
        x, budget = tokens.features, self.wanted(tokens, site)
        # 1. Frames keep equal shares of their tokens.
        index = torch.arange(len(x), device=x.device) if tokens.index is None else tokens.index
        sizes = (index // (h * w)).bincount(minlength=t).tolist()
        counts = ops.apportion(budget, sizes, sizes)
        # 2. Of every frame, one by one, the token that adds most: relevance times what the others do not span.
        order = ops.dpp_map(x, self.relevance(tokens).log(), sizes, counts, kernel="cosine")
        return Reduction(order.sort().values, len(x), notes={"counts": counts, "order": order})

    def relevance(self, tokens: VideoTokens) -> Tensor:
        """[M] fp64, about 0 to 1 over all frames; 1 where all tokens are equally relevant."""
        return self.scaled(self.likeness(tokens))

    def likeness(self, tokens: VideoTokens) -> Tensor:
        """[M] fp64 mean cosine of every token to the text's."""
        text = normalize(tokens.signal("text_hidden").double(), dim=-1, eps=1e-300).mean(0)
        parts = (part.double() for part in tokens.features.split(256))
        return torch.cat([part @ text / part.norm(dim=1).clamp_min(1e-300) for part in parts])

    def scaled(self, likeness: Tensor) -> Tensor:
        """From mean cosines to relevance; the smallest and the largest are those of the whole video."""
        value = likeness if self.relevant == "like" else -likeness
        low, high = value.amin(), value.amax()
        return torch.where(high > low, (value - low + self.eps) / (high - low), torch.ones_like(value))
