"""What a piece of work takes: time, memory, kernels launched and waits for the device."""

from __future__ import annotations

import contextlib
import ctypes
import json
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vidcompress.engine.saliency import synchronise

Work = Callable[[], object]

WAITS = frozenset(
    "_local_scalar_dense nonzero masked_select bincount equal is_nonzero _unique2 unique_dim unique_consecutive".split()
)
"""Operators whose result the host has to wait for."""

FREE = frozenset(
    "alias as_strided detach diagonal empty empty_like empty_strided expand lift_fresh new_empty permute real "
    "_reshape_alias select slice split split_with_sizes squeeze t transpose unbind unfold _unsafe_view unsqueeze view "
    "view_as_real".split()
)
"""Operators that launch nothing."""


def device_at_hand() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, Any]:
    """What work runs on, for a report."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads()}


def save(report: dict[str, Any], path: Path) -> None:
    """A report as a JSON file; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def milliseconds(work: Work, device: torch.device) -> float:
    """Of one call, until the device is done."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start)


def megabytes(work: Work, device: torch.device) -> float | None:
    """Most memory of one call beyond what was there before; None where the system does not tell."""
    _allocate_anew(True)
    try:
        before = reset_peak_memory(device)
        work()
        synchronise(device)
        peak = peak_memory_mb(device)
    finally:
        _allocate_anew(False)
    return None if peak is None or before is None else max(0.0, peak - before)


def reset_peak_memory(device: torch.device) -> float | None:
    """Lets `peak_memory_mb` count from now on; the MB in use now, None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1e6
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _resident("VmRSS")


def peak_memory_mb(device: torch.device) -> float | None:
    """Most MB since `reset_peak_memory`: allocated on the GPU or resident in the process; None if it is not told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return _resident("VmHWM")


def _resident(line: str) -> float | None:
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(entry.split()[1]) / 1e3 for entry in status.splitlines() if entry.startswith(line))
    return None


def _allocate_anew(wanted: bool) -> None:
    """Lets glibc map every block anew and give it back at once, so that resident memory is what is in use; or, as it
    does by itself after a while, keep blocks of up to 32 MB: page faults cost more than most work."""
    if platform.system() == "Linux":
        m_mmap_threshold, m_trim_threshold = -3, -1
        with contextlib.suppress(AttributeError):  # another C library
            library = ctypes.CDLL(None)
            library.mallopt(m_mmap_threshold, 1 << 16 if wanted else 32 << 20)
            library.mallopt(m_trim_threshold, 1 << 17 if wanted else 64 << 20)
            library.malloc_trim(0)


@dataclass(frozen=True)
class Launches:
    """Counts of one piece of work.

    Attributes:
        kernels: launched on the GPU, copies and fills included; on a CPU the operators that would launch some, one
            each: too few where an operator is many kernels (a sort, an eigenvalue solver), too many where work is cut
            into pieces that fit a CPU's caches.
        waits: for the device.
        by: kernels by name, most frequent first.
    """

    kernels: int
    waits: int
    by: dict[str, int]


def count_launches(work: Work, device: torch.device) -> Launches:
    """Runs `work` and counts: by the profiler on a GPU, by the operators that it calls elsewhere."""
    if device.type == "cuda":
        return _profiled(work)
    with _Operators() as seen:
        work()
    kernels = Counter({name: n for name, n in seen.calls.items() if name not in FREE and name not in WAITS})
    waits = sum(n for name, n in seen.calls.items() if name in WAITS)
    return Launches(sum(kernels.values()), waits + seen.masked, dict(kernels.most_common()))


class _Operators(TorchDispatchMode):
    """Counts operators; an index by a mask waits for the number of its marks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.masked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        self.calls[name] += 1
        if name in ("index", "index_put", "index_put_"):
            self.masked += any(index is not None and index.dtype == torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


def _profiled(work: Work) -> Launches:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
    torch.cuda.synchronize()
    calls = Counter({event.key: event.count for event in seen.key_averages()})
    launched = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")
    kernels = Counter({name: n for name, n in calls.items() if name.startswith(launched)})
    waits = sum(n for name, n in calls.items() if "Synchronize" in name)
    return Launches(sum(kernels.values()), waits, dict(kernels.most_common()))
