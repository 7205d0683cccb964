"""How many salient tokens and how many anchors every frame of a segmented video gets."""

from vidcompress.ops.anchor_budgets.naive import anchor_budgets

__all__ = ["anchor_budgets"]
