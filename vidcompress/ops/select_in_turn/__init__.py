"""Picking tokens frame after frame, where what was picked before counts against a position that does not change."""

from vidcompress.ops.select_in_turn.naive import select_in_turn

__all__ = ["select_in_turn"]
