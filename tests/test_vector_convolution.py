from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn.grad import conv2d_weight

pytest.importorskip("numba")

from tune_mnist.mnist.cpu import llvm as convolutions
from tune_mnist.mnist.cpu.loops import Floats

pytestmark = pytest.mark.skipif(not convolutions.serves(8), reason="for CPUs with AVX-512 or AVX2")

# Images, input channels, output channels, side, kernel.
BY_TILES = [(2, 16, 32, 24, 3), (5, 8, 8, 4, 3), (2, 24, 40, 12, 3), (1, 8, 16, 32, 3)]
BY_ROWS = [(2, 32, 8, 22, 1), (2, 8, 16, 9, 3), (1, 24, 40, 37, 5)]
FROM_ONE_CHANNEL = (3, 1, 8, 28, 3)
COMPILED = [
    convolutions._convolution_by_tiles,
    convolutions._weight_sums_of_tiles,
    convolutions._convolution_by_rows,
    convolutions._weight_sums_of_rows,
]
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(params=["this CPU's vectors", "8 lanes, 16 registers"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The functions for this CPU, or for one with AVX2."""
    if request.param != "this CPU's vectors":
        monkeypatch.setattr(convolutions, "_LANES", 8)
        monkeypatch.setattr(convolutions, "_REGISTERS", 16)
    for compiled in COMPILED:
        compiled.cache_clear()
    yield
    for compiled in COMPILED:
        compiled.cache_clear()


class Case:
    """Random images, filters and gradients, and their exact results."""

    def __init__(
        self, batch: int, inputs: int, outputs: int, side: int, kernel: int, order: str = "C"
    ) -> None:
        generator = np.random.default_rng(side)
        draw = generator.standard_normal
        self.x = draw((batch, side, side, inputs)).astype(np.float32)
        self.weight = draw((outputs, inputs, kernel, kernel)).astype(np.float32)
        self.bias = draw(outputs).astype(np.float32)
        self.gradient = draw((batch, side - kernel + 1, side - kernel + 1, outputs)).astype(
            np.float32
        )
        if order == "channels last":  # the strides that torch gives a weight for its own functions
            self.weight = self.weight.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)

    def exact(self) -> tuple[Floats, Floats, Floats]:
        """Return the convolution and the gradients of images and weight, in double precision."""
        x, weight, bias = (
            torch.tensor(array, dtype=torch.float64, requires_grad=True)
            for array in (self.x.transpose(0, 3, 1, 2), self.weight, self.bias)
        )
        out = torch.conv2d(x, weight, bias)
        gradient = torch.tensor(self.gradient.transpose(0, 3, 1, 2), dtype=torch.float64)
        out.backward(gradient)  # type: ignore[no-untyped-call]
        assert x.grad is not None and weight.grad is not None
        last = [t.detach().permute(0, 2, 3, 1).numpy() for t in (out, x.grad)]
        return last[0], last[1], weight.grad.numpy()


def assert_near(found: Floats, exact: Floats, terms: int) -> None:
    """Within the float32 rounding of a sum of so many terms of order 1."""
    assert found.shape == exact.shape
    assert np.abs(found - exact).max() < 8 * EPS * terms**0.5 * np.log2(terms)


@pytest.mark.parametrize("shape", [*BY_TILES, *BY_ROWS, FROM_ONE_CHANNEL])
def test_a_convolution_is_exact_within_float32(
    vectors: None, shape: tuple[int, int, int, int, int]
) -> None:
    case = Case(*shape)
    out = np.full(case.gradient.shape, np.nan, np.float32)
    convolutions.convolve(case.x, case.weight, case.bias, out)
    assert_near(out, case.exact()[0], terms=shape[1] * shape[4] ** 2)


@pytest.mark.parametrize("shape", [*BY_TILES, *BY_ROWS])
def test_the_gradient_of_the_images_is_exact_within_float32(
    vectors: None, shape: tuple[int, int, int, int, int]
) -> None:
    case = Case(*shape)
    out = np.full(case.x.shape, np.nan, np.float32)
    convolutions.input_gradient(case.gradient, case.weight, out)
    assert_near(out, case.exact()[1], terms=shape[2] * shape[4] ** 2)


@pytest.mark.parametrize("shape", [*BY_TILES, *BY_ROWS, FROM_ONE_CHANNEL])
def test_the_gradient_of_the_weight_is_exact_within_float32(
    vectors: None, shape: tuple[int, int, int, int, int]
) -> None:
    case = Case(*shape)
    found = convolutions.weight_gradient(case.x, case.gradient)
    assert_near(found, case.exact()[2], terms=shape[0] * shape[3] ** 2)


def test_sums_over_a_whole_batch_are_as_exact_as_torchs() -> None:
    case = Case(128, 16, 32, 24, 3)
    exact = case.exact()[2]
    found = convolutions.weight_gradient(case.x, case.gradient)
    x, gradient = (torch.from_numpy(a.transpose(0, 3, 1, 2)) for a in (case.x, case.gradient))
    by_torch = conv2d_weight(x, (32, 16, 3, 3), gradient).numpy()  # type: ignore[no-untyped-call]
    assert np.abs(found - exact).max() < 2 * np.abs(by_torch - exact).max()


@pytest.mark.parametrize("kernel", [3, 1])
def test_images_and_gradients_may_have_any_strides(kernel: int) -> None:
    case = Case(2, 16, 8, 12, kernel)
    results = []
    for strided in (False, True):
        x, gradient = (
            a.transpose(0, 3, 1, 2).copy().transpose(0, 2, 3, 1) if strided else a
            for a in (case.x, case.gradient)
        )
        out, of_x = np.empty_like(case.gradient), np.empty_like(case.x)
        convolutions.convolve(x, case.weight, case.bias, out)
        convolutions.input_gradient(gradient, case.weight, of_x)
        results.append((out, of_x, convolutions.weight_gradient(x, gradient)))
    for one, other in zip(*results, strict=True):
        assert np.array_equal(one, other)


def test_a_weight_may_have_any_strides() -> None:
    plain, strided = Case(2, 8, 16, 12, 3), Case(2, 8, 16, 12, 3, order="channels last")
    assert plain.weight.strides != strided.weight.strides
    results = []
    for case in (plain, strided):
        out, of_x = np.empty_like(case.gradient), np.empty_like(case.x)
        convolutions.convolve(case.x, case.weight, case.bias, out)
        convolutions.input_gradient(case.gradient, case.weight, of_x)
        results.append((out, of_x))
    for one, other in zip(*results, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("kernel", [3, 4])
def test_relu_cuts_at_zero_and_keeps_what_is_no_number(kernel: int) -> None:
    case = Case(2, 8, 16, 12, kernel)
    case.x[1, 5, 5, 3] = np.nan
    plain, rectified = np.empty_like(case.gradient), np.empty_like(case.gradient)
    convolutions.convolve(case.x, case.weight, case.bias, plain)
    convolutions.convolve(case.x, case.weight, case.bias, rectified, relu=True)
    assert np.isnan(plain[1, 6 - kernel : 6, 6 - kernel : 6]).all()
    assert np.array_equal(rectified, np.where(plain < 0, 0, plain), equal_nan=True)


def test_equal_inputs_give_equal_bits() -> None:
    case = Case(3, 16, 32, 20, 3)
    first, second = np.empty_like(case.gradient), np.empty_like(case.gradient)
    for out in (first, second):
        convolutions.convolve(case.x.copy(), case.weight.copy(), case.bias, out)
    assert np.array_equal(first, second)


def test_numbers_of_channels_that_vectors_do_not_divide_are_left_to_torch() -> None:
    assert not convolutions.serves(1)
    assert not convolutions.serves(12)
