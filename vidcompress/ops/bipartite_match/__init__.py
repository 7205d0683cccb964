"""Which tokens merge into which, all at once (ToMe)."""

from __future__ import annotations

from torch import Tensor

from vidcompress.ops.dispatch import implementation

__all__ = ["bipartite_match"]


def bipartite_match(tokens: Tensor, count: int, protected: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Every second token, from the first on, is matched with the one of the others that it is most like (cosine), and
    the most alike of these pairs are to merge (ToMe). Pairs whose cosines agree to 1e-12 are equally alike; ties go to
    the lowest index.

    Args:
        tokens: [n, C].
        count: pairs to merge, at most (n - protected) // 2.
        protected: so many first tokens neither go nor take others in (class and distillation token).

    Returns:
        (gone, into, left): [count] tokens that go and [count] the tokens that take them in, the most alike first, and
        the other tokens that could have gone, in the same order. All are long indices.

    Raises:
        ValueError: another count.
    """
    able = max(0, len(tokens) - protected)
    if not 0 <= count <= able // 2:
        raise ValueError(f"count must be 0 to half of the {able} tokens that may merge, got {count}")
    return implementation("bipartite_match", tokens.device)(tokens, count, protected)
