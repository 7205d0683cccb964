"""Clusters around density peaks (DPC-KNN, without its randomness)."""

from vidcompress.ops.density_clusters.naive import density_clusters

__all__ = ["density_clusters"]
