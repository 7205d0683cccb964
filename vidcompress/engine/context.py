"""State that belongs to one thread."""

from __future__ import annotations

import threading
from typing import Any


class ThreadState(threading.local):
    """Attributes that every thread sees for itself, None until it sets them. A copy or a pickle starts empty.

    Attributes:
        concerns_layers, concerns_rotary: whether the hooks on decoder layers and on the rotary embedding have something
            to do. They are there from the start, so that torch.compile guards on them.
    """

    concerns_layers: bool
    concerns_rotary: bool

    def __init__(self) -> None:
        self.concerns_layers = self.concerns_rotary = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> ThreadState:
        return ThreadState()

    def __reduce__(self) -> tuple[type[ThreadState], tuple[()]]:
        return ThreadState, ()
