"""The steps that methods share. Each folder holds `naive.py`, the definition; where it pays `torch.py`, as fast and as
exact; and where it pays more `kernel.py`, in Triton (docs/kernels.md). All decisions are taken in fp32 or better, ties
go to the lowest index, and two runs give the same bits.
"""

from vidcompress.ops.adjacent_difference import adjacent_difference
from vidcompress.ops.anchor_budgets import anchor_budgets
from vidcompress.ops.anchor_merge import anchor_merge
from vidcompress.ops.apportion import apportion
from vidcompress.ops.bipartite_match import bipartite_match
from vidcompress.ops.breaches import breaches
from vidcompress.ops.column_mean_attention import column_mean_attention
from vidcompress.ops.components import components
from vidcompress.ops.compose import compose
from vidcompress.ops.cosine_fingerprint import cosine_fingerprint
from vidcompress.ops.cosine_fingerprints import cosine_fingerprints
from vidcompress.ops.density_clusters import density_clusters
from vidcompress.ops.density_peaks import density_peaks
from vidcompress.ops.dpp_map import dpp_map
from vidcompress.ops.even_shares import even_shares
from vidcompress.ops.fair_shares import fair_shares
from vidcompress.ops.farthest_points import farthest_points
from vidcompress.ops.frame_change import frame_change
from vidcompress.ops.linkage import linkage
from vidcompress.ops.max_cosine import max_cosine
from vidcompress.ops.merge import merge
from vidcompress.ops.minmax import minmax
from vidcompress.ops.nearest import nearest
from vidcompress.ops.places import places
from vidcompress.ops.retention_pool import retention_pool
from vidcompress.ops.segment_frames import segment_frames
from vidcompress.ops.select_in_turn import select_in_turn
from vidcompress.ops.spectral_entropies import spectral_entropies
from vidcompress.ops.spectral_entropy import spectral_entropy
from vidcompress.ops.standardise import standardise
from vidcompress.ops.steady_positions import steady_positions
from vidcompress.ops.text_attention import text_attention
from vidcompress.ops.through_means import through_means
from vidcompress.ops.top_tokens import top_tokens
from vidcompress.ops.window_change import window_change
from vidcompress.ops.with_means import with_means

__all__ = [
    "adjacent_difference",
    "anchor_budgets",
    "anchor_merge",
    "apportion",
    "bipartite_match",
    "breaches",
    "column_mean_attention",
    "components",
    "compose",
    "cosine_fingerprint",
    "cosine_fingerprints",
    "density_clusters",
    "density_peaks",
    "dpp_map",
    "even_shares",
    "fair_shares",
    "farthest_points",
    "frame_change",
    "linkage",
    "max_cosine",
    "merge",
    "minmax",
    "nearest",
    "places",
    "retention_pool",
    "segment_frames",
    "select_in_turn",
    "spectral_entropies",
    "spectral_entropy",
    "standardise",
    "steady_positions",
    "text_attention",
    "through_means",
    "top_tokens",
    "window_change",
    "with_means",
]
