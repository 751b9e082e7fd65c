from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from tune_mnist.mnist.cpu import loops as kernels
from tune_mnist.mnist.cpu.loops import Bytes, Floats

Fill = Callable[[np.uint64, np.int32, Bytes], None]

needs_numba = pytest.mark.skipif(not kernels.COMPILED, reason="needs numba")


def drawn(seed: int, dropout: float, count: int) -> Bytes:
    keep = np.full(count, 7, np.uint8)
    kernels.draw_keep(seed, dropout, keep)
    return keep


def test_masks_hold_0_and_1_only() -> None:
    assert set(np.unique(drawn(seed=1, dropout=0.5, count=100_001))) == {0, 1}


@pytest.mark.parametrize("dropout", [0.001, 0.1, 0.5, 0.9])
def test_masks_drop_at_the_asked_rate(dropout: float) -> None:
    count = 4_000_000
    dropped = 1 - drawn(seed=2, dropout=dropout, count=count).mean()
    four_sigma = 4 * (dropout * (1 - dropout) / count) ** 0.5
    assert abs(dropped - dropout) < four_sigma + 2**-16


def test_the_rate_of_one_draw_is_exact_to_a_65536th() -> None:
    threshold = round(0.3 * 2**16)
    assert abs(threshold / 2**16 - 0.3) <= 2**-17
    words = np.arange(2**16, dtype=np.uint16)  # every value that 16 bits can take, once
    assert (words < threshold).sum() == threshold


def test_masks_of_neighbouring_seeds_and_places_are_independent() -> None:
    count = 1_000_000
    masks = [drawn(seed, 0.5, count) * 2.0 - 1 for seed in (10, 11, 10 + 2**32, -1, 2**63 - 1)]
    # 4,096 elements are made from one block of random words, 64 of them are a row of the kernels.
    shifted = [np.roll(masks[0], shift) for shift in (1, 2, 3, 4, 8, 32, 64, 4096, 65536)]
    for other in masks[1:] + shifted:
        assert abs(np.mean(masks[0] * other)) < 5 / count**0.5


def test_products_of_four_draws_are_balanced() -> None:
    signs = drawn(seed=3, dropout=0.5, count=2**20).reshape(-1, 4) * 2.0 - 1
    assert abs(signs.prod(1).mean()) < 5 / 2**9


def test_equal_seeds_give_equal_masks_and_others_do_not() -> None:
    assert np.array_equal(drawn(4, 0.5, 5_000), drawn(4, 0.5, 5_000))
    assert not np.array_equal(drawn(4, 0.5, 5_000), drawn(5, 0.5, 5_000))


def test_a_shorter_mask_is_the_longer_one_cut() -> None:
    assert np.array_equal(drawn(6, 0.5, 70_001)[:4_099], drawn(6, 0.5, 4_099))


def test_numpy_draws_splitmix64() -> None:
    # The first outputs of SplitMix64 from seed 1234567, as published with the generator.
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    quarters = np.array(words, np.uint64).view(np.uint16)
    keep = np.empty(16, np.uint8)
    for threshold in (1, 3_000, 20_000, 40_000, 65_535, 65_536):
        kernels._fill_keep_by_numpy(np.uint64(1234567), np.int32(threshold), keep)
        assert np.array_equal(keep, quarters >= threshold)


@needs_numba
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.999999])
@pytest.mark.parametrize("seed", [0, 2**64 - 1, 987654321987654321])
def test_numba_and_numpy_draw_the_same_bits(
    seed: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_numba = drawn(seed, dropout, 70_003)
    monkeypatch.setattr(kernels, "COMPILED", False)
    assert np.array_equal(drawn(seed, dropout, 70_003), by_numba)


def activations(count: int, channels: int, offset: float = 0.0) -> Floats:
    values = np.random.default_rng(channels).normal(offset, 1, (count, channels))
    return values.astype(np.float32).ravel()


@pytest.mark.parametrize("channels", [8, 16, 32])
@pytest.mark.parametrize("count", [1, 5, 81 * 3, 4_099])
def test_moments_are_those_of_each_channel(channels: int, count: int) -> None:
    x = activations(count, channels)
    expected = x.reshape(count, channels).astype(np.float64)
    mean, variance = kernels.moments(x, channels)
    np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(variance, expected.var(0), rtol=1e-5, atol=1e-7)


def test_variance_survives_a_mean_of_a_thousand_deviations() -> None:
    x = activations(4_000, 8, offset=1_000.0)
    expected = x.reshape(-1, 8).astype(np.float64).var(0)
    _, variance = kernels.moments(x, 8)
    np.testing.assert_allclose(variance, expected, rtol=1e-4)


def test_moments_of_a_channel_with_nan_are_nan() -> None:
    x = activations(500, 8)
    x[8 * 300 + 3] = np.nan
    mean, variance = kernels.moments(x, 8)
    assert np.isnan(x[8 * 300 + 3])
    assert np.array_equal(np.isnan(mean), np.arange(8) == 3)
    assert np.array_equal(np.isnan(variance), np.arange(8) == 3)


def pool(x: torch.Tensor) -> tuple[Floats, Bytes]:
    batch, channels, height, width = x.shape
    pairs = x.permute(0, 2, 3, 1).contiguous().numpy()
    out = np.empty((batch * height // 2, width // 2, channels), np.float32)
    winner = np.empty(out.shape, np.uint8)
    pairs = pairs.reshape(-1, 2, width // 2, 2 * channels)
    kernels.max_pool(pairs, channels, out, winner)
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
    kernels.max_pool_backward(flat_top, winner, 8, gradient)
    found = torch.from_numpy(gradient).view(2, 6, 6, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected_gradient, rtol=0, atol=0)
