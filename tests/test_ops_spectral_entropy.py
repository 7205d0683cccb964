"""The entropy by determinants, which a GPU takes, against that of the singular values."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from test_ops import implementations, randn
from torch import Tensor

together = importlib.import_module("vidcompress.ops.spectral_entropies.torch")
fast, determinants = (
    importlib.import_module(f"vidcompress.ops.spectral_entropy.{m}") for m in ("torch", "determinants")
)


def decaying(n: int, channels: int, power: float, mean: float = 0.0) -> Tensor:
    """Tokens whose channels' sizes fall as a power of their number."""
    return randn(n, channels) * torch.arange(1, channels + 1).float() ** -power + mean


SPECTRA = {
    "white": lambda: randn(150, 200),
    "slow": lambda: decaying(150, 200, 0.5),
    "fast": lambda: decaying(150, 200, 3),
    "with a mean": lambda: decaying(150, 200, 0.5, 0.3),
    "more tokens than channels": lambda: decaying(300, 60, 1),
    "few directions": lambda: decaying(150, 20, 0.5) @ randn(20, 200, seed=1),
    "frozen": lambda: decaying(50, 200, 0.5).repeat(3, 1),
    "one direction": lambda: randn(1, 200).expand(150, -1),
    "nothing": lambda: torch.zeros(150, 200),
    "one token": lambda: randn(1, 200),
    "two": lambda: torch.eye(2),
    "all alike": lambda: torch.eye(100),
    "x 0.001": lambda: decaying(150, 200, 0.5) * 1e-3,
    "x 1000": lambda: decaying(150, 200, 0.5) * 1e3,
    "bfloat16": lambda: decaying(150, 200, 0.5).bfloat16(),
}


@pytest.mark.parametrize("elements", [32 << 20, 1])
@pytest.mark.parametrize("case", SPECTRA)
def test_entropy_by_determinants(case: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fast.DETERMINANTS, "cpu", True)
    monkeypatch.setattr(determinants, "CHUNK_ELEMENTS", {"cpu": elements})
    tokens = SPECTRA[case]()
    got, again = fast.spectral_entropy(tokens), fast.spectral_entropy(tokens)
    assert got.dtype == torch.float64 and torch.equal(got, again)
    torch.testing.assert_close(got, implementations("spectral_entropy")[0](tokens), atol=3e-6, rtol=0)


def test_places_and_weights_stand_for_x_log_x() -> None:
    """Over all eigenvalues there can be: exact at both ends, and elsewhere within what the module promises."""
    x = torch.cat([torch.tensor([0.0]), torch.logspace(-12, 0, 20_001, dtype=torch.float64)])
    at, weight = determinants.places(x.device)
    got = determinants.LINEAR * x + determinants.SQUARE * x.square() + (x[:, None] / at).log1p() @ weight
    error = (got + torch.special.entr(x)).abs()
    assert error[0] == 0 and error[-1] < 1e-14
    assert (error / (x + 1 / 3584)).max() < 1.5e-6


@pytest.mark.parametrize("small", [1024, 0])
@pytest.mark.parametrize("elements", [32 << 20, 1])
@pytest.mark.parametrize("channels", [200, 24])
def test_entropies_of_all_segments_at_once(
    channels: int, elements: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fast.DETERMINANTS, "cpu", True)
    check_all_segments(together.spectral_entropies, channels, elements, small, monkeypatch)


def check_all_segments(
    run: Callable[..., Tensor], channels: int, elements: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one token, of fewer than channels, of more; frozen ones, empty ones; padded to each other's sizes or not."""
    monkeypatch.setattr(together, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(together, "SMALL", small)
    tokens = randn(20, 9, channels) * torch.arange(1, channels + 1).float() ** -0.5
    tokens[6:9], tokens[9:11] = tokens[5], 0
    segments = [(0, 1), (1, 5), (5, 9), (9, 11), (11, 12), (12, 20)]
    got = run(tokens, segments).cpu()
    want = torch.stack([implementations("spectral_entropy")[0](tokens[a:b].flatten(0, 1)) for a, b in segments])
    torch.testing.assert_close(got, want, atol=3e-6, rtol=0)
    alone = run(tokens[:2, :1], [(0, 1), (1, 2)])
    assert alone.tolist() == [0, 0] and alone.dtype == torch.float64
