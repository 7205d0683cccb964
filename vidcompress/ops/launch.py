"""What the Triton kernels of the ops have in common. Importing this needs Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs the kernels. It would multiply the bit patterns of bf16, so tiles are made fp32
before; and it takes as long for a small tile as for a large one, so programs do more each."""

OPTIONS = {"enable_fp_fusion": True}
"""Said because its default changes with Triton 3.10, and 3.9 warns of that."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs a Triton kernel on the device of its first argument.

    Args:
        grid: programs along each axis; without any nothing is run.
        arguments: what the kernel takes, tensors as pointers to their first element.
        constants: its `tl.constexpr` parameters, and `num_warps` and `num_stages`.
    """
    if all(grid):
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **constants, **OPTIONS)


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself if the elements of its last dimension lie side by side, as the kernels want them, or a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
