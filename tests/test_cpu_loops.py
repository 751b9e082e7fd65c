"""The compiled loops of a CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tune_mnist.errors import TuneMnistError
from tune_mnist.mnist.forward import keep_mask

pytest.importorskip("numba")

from numba import config
from numba.core import caching

from tune_mnist.mnist.cpu import loops
from tune_mnist.mnist.cpu.loops import Bytes, Floats


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.999999, 1.0])
@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1, 987654321987654321])
def test_masks_have_numpys_bits(seed: int, dropout: float) -> None:
    keep = np.full(70_003, 7, np.uint8)
    loops.draw_keep(seed, dropout, keep)
    assert np.array_equal(keep, keep_mask(seed, dropout, 70_003))


@pytest.mark.parametrize("offset", [0.0, 1_000.0])  # of a thousand deviations
@pytest.mark.parametrize("channels", [8, 16, 32])
@pytest.mark.parametrize("count", [1, 5, 81 * 3, 4_099])
def test_moments_are_those_of_each_channel(channels: int, count: int, offset: float) -> None:
    values = np.random.default_rng(channels).normal(offset, 1, (count, channels))
    x = values.astype(np.float32)
    expected = x.astype(np.float64)
    mean, variance = loops.moments(x.ravel(), channels)
    np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(variance, expected.var(0), rtol=1e-4 if offset else 1e-5, atol=1e-7)


def pool(x: torch.Tensor) -> tuple[Floats, Bytes]:
    batch, channels, height, width = x.shape
    pairs = x.permute(0, 2, 3, 1).contiguous().numpy()
    out = np.empty((batch * height // 2, width // 2, channels), np.float32)
    winner = np.empty(out.shape, np.uint8)
    pairs = pairs.reshape(-1, 2, width // 2, 2 * channels)
    loops.max_pool(pairs, channels, out, winner)
    return out, winner


def test_max_pool_and_its_gradient_are_torchs_for_ties_and_nan_too() -> None:
    x = torch.randint(0, 3, (2, 8, 6, 6)).float()  # three values: most maxima are tied
    x[0, 1, 2, 3] = x[1, 2, 0, 0] = x[1, 7, 5, 5] = x[1, 7, 4, 5] = torch.nan
    x.requires_grad_()
    expected = nn.functional.max_pool2d(x, 2)
    out, winner = pool(x.detach())
    pooled = torch.from_numpy(out).view(2, 3, 3, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(pooled, expected.detach(), rtol=0, atol=0, equal_nan=True)

    top = torch.randn(2, 8, 3, 3)
    (expected_gradient,) = torch.autograd.grad(expected, x, top)
    gradient = np.empty((6, 2, 3, 16), np.float32)
    flat_top = top.permute(0, 2, 3, 1).contiguous().numpy().reshape(6, 3, 8)
    loops.max_pool_backward(flat_top, winner, 8, gradient)
    found = torch.from_numpy(gradient).view(2, 6, 6, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected_gradient, rtol=0, atol=0)


def double(value: float) -> float:
    return 2 * value


def test_code_that_is_kept_is_used_again_and_damaged_code_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    for hits in (0, 1):
        loop: Any = loops.compiled(double)
        assert loop(2.0) == 4.0
        assert sum(loop.stats.cache_hits.values()) == hits
    for file in tmp_path.rglob("*.nb?"):
        file.write_bytes(b"damaged")
    assert loops.compiled(double)(2.0) == 4.0
    unused = loops.compiled(double)
    (folder,) = tmp_path.iterdir()
    folder.rename(tmp_path / "moved")
    folder.touch()  # as if the disk were full: nothing can be written there
    assert unused(2.0) == 4.0


@pytest.mark.parametrize("room", [True, False])
def test_where_numba_finds_no_folder_code_is_kept_among_the_caches_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room: bool
) -> None:
    def cache_dir() -> Path:
        if not room:
            raise TuneMnistError("no room")
        return tmp_path

    monkeypatch.setattr(config, "CACHE_DIR", "")
    for locator in (caching.InTreeCacheLocator, caching.UserWideCacheLocator):
        monkeypatch.setattr(locator, "from_function", lambda *_: None)
    monkeypatch.setattr(loops, "cache_dir", cache_dir)
    assert loops.compiled(double)(2.0) == 4.0
    assert bool(list(tmp_path.rglob("numba/*/*.nbc"))) == room
