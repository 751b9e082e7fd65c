from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from tune_mnist.mnist.cpu import convolution, llvm
from tune_mnist.mnist.cpu.convolution import Convolutions, convolutions
from tune_mnist.mnist.forward import LAST, torch_convolve

pytestmark = pytest.mark.skipif(not llvm.LANES, reason="for CPUs with AVX-512 or AVX2")

Shape = tuple[int, int, int, int, int]  # images, input channels, output channels, side, kernel
OF_THE_NET: list[Shape] = [
    *((2, 8, 16, 26, 3), (2, 16, 32, 24, 3), (2, 32, 8, 22, 1), (2, 8, 16, 22, 3)),
    *((2, 16, 32, 20, 3), (2, 32, 8, 9, 1), (2, 8, 16, 9, 3), (2, 16, 32, 7, 3)),
]
OTHERS: list[Shape] = [
    *((5, 8, 8, 4, 3), (2, 24, 40, 12, 3), (1, 8, 16, 32, 3)),  # by tiles
    (1, 24, 40, 37, 5),  # by rows
]
FROM_ONE_CHANNEL: Shape = (3, 1, 8, 28, 3)
EPS = torch.finfo(torch.float32).eps
VECTORS = convolutions(one_thread=True)


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile for a CPU with shorter vectors, and fewer registers for them."""
    monkeypatch.setattr(llvm, "LANES", 8)
    monkeypatch.setattr(llvm, "REGISTERS", 16)
    forget_compiled()
    yield
    forget_compiled()


def forget_compiled() -> None:
    llvm.convolution_by_tiles.cache_clear()
    llvm.weight_sums_of_tiles.cache_clear()
    llvm.convolution_by_rows.cache_clear()
    llvm.weight_sums_of_rows.cache_clear()


class Case:
    """Random images, filters and gradients, and their exact results."""

    def __init__(self, batch: int, inputs: int, outputs: int, side: int, kernel: int) -> None:
        draw = torch.Generator().manual_seed(side)
        results = side - kernel + 1
        self.images = torch.randn(batch, inputs, side, side, generator=draw)
        self.images = self.images.contiguous(memory_format=LAST)
        self.weight = torch.randn(outputs, inputs, kernel, kernel, generator=draw)
        self.bias = torch.randn(outputs, generator=draw)
        self.gradient = torch.randn(batch, outputs, results, results, generator=draw)
        self.gradient = self.gradient.contiguous(memory_format=LAST)

    def results(self, by: Convolutions = VECTORS) -> tuple[Tensor, Tensor, Tensor]:
        """The convolution, and the gradients of images and weight."""
        return (
            by.convolve(self.images, self.weight, self.bias, False),
            by.image_gradient(self.gradient, self.images, self.weight),
            by.weight_gradient(self.gradient, self.images, self.weight),
        )

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same in float64, by autograd."""
        images, weight = (each.double().requires_grad_() for each in (self.images, self.weight))
        out = torch.conv2d(images, weight, self.bias.double())
        of_images, of_weight = torch.autograd.grad(out, (images, weight), self.gradient.double())
        return out.detach(), of_images, of_weight


def assert_near(found: Tensor, exact: Tensor, terms: int) -> None:
    """Within the float32 rounding of a sum of so many terms of order 1."""
    assert found.shape == exact.shape
    assert (found - exact).abs().max() < 8 * EPS * terms**0.5 * np.log2(terms)


def assert_exact(shape: Shape) -> None:
    images, inputs, outputs, side, kernel = shape
    found, exact = Case(*shape).results(), Case(*shape).exact()
    terms = (inputs * kernel**2, outputs * kernel**2, images * side**2)
    for one, other, count in zip(found, exact, terms, strict=True):
        assert_near(one, other, count)


def marked(*quick: Shape) -> list[Any]:
    """All shapes, slow but for these: no net here needs the others to be compiled."""
    return [
        pytest.param(shape, marks=() if shape in quick else pytest.mark.slow)
        for shape in (*OF_THE_NET, *OTHERS)
    ]


@pytest.mark.parametrize("shape", marked(*OF_THE_NET))
def test_convolutions_and_their_gradients_are_exact_within_float32(shape: Shape) -> None:
    assert_exact(shape)


@pytest.mark.usefixtures("avx2")
@pytest.mark.parametrize("shape", marked(OF_THE_NET[3], OF_THE_NET[5]))  # by tiles and by rows
def test_those_for_avx2_are_as_exact(shape: Shape) -> None:
    assert_exact(shape)


def test_images_of_one_channel_need_no_gradient_and_are_exact_too() -> None:
    case = Case(*FROM_ONE_CHANNEL)
    out, _, of_weight = case.exact()
    assert_near(VECTORS.convolve(case.images, case.weight, case.bias, False), out, 9)
    found = VECTORS.weight_gradient(case.gradient, case.images, case.weight)
    assert_near(found, of_weight, 3 * 28**2)


def test_sums_over_a_whole_batch_are_as_exact_as_torchs() -> None:
    case = Case(128, 16, 32, 24, 3)
    exact = case.exact()[2]
    found, by_torch = (
        convolutions(one_thread).weight_gradient(case.gradient, case.images, case.weight)
        for one_thread in (True, False)
    )
    assert (found - exact).abs().max() < 2 * (by_torch - exact).abs().max()


@pytest.mark.parametrize("shape", [OF_THE_NET[3], OF_THE_NET[2]])
@pytest.mark.parametrize("changed", ["images", "gradient", "weight"])
def test_inputs_of_any_strides_give_the_same_bits(shape: Shape, changed: str) -> None:
    plain, strided = Case(*shape), Case(*shape)
    format_of = torch.contiguous_format if changed != "weight" else LAST
    setattr(strided, changed, getattr(strided, changed).contiguous(memory_format=format_of))
    for one, other in zip(plain.results(), strided.results(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [OF_THE_NET[3], OF_THE_NET[6]])  # by tiles and by rows
def test_relu_cuts_at_zero_and_keeps_what_is_no_number(shape: Shape) -> None:
    case, kernel = Case(*shape), shape[4]
    case.images[1, 3, 5, 5] = torch.nan
    plain, rectified = (
        VECTORS.convolve(case.images, case.weight, case.bias, relu) for relu in (False, True)
    )
    assert plain[1, :, 6 - kernel : 6, 6 - kernel : 6].isnan().all()
    expected = torch.where(plain < 0, 0, plain)
    torch.testing.assert_close(rectified, expected, rtol=0, atol=0, equal_nan=True)


def test_several_threads_and_other_cpus_use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert VECTORS.convolve is convolution.convolve
    assert convolutions(one_thread=False).convolve is torch_convolve
    monkeypatch.setattr(llvm, "LANES", 0)
    assert convolutions(one_thread=True).convolve is torch_convolve
