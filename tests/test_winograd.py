from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn.grad import conv2d_weight

pytest.importorskip("numba")

from tune_mnist.mnist import winograd
from tune_mnist.mnist.winograd import Floats

pytestmark = pytest.mark.skipif(
    not winograd.applies(8, 8, 3, 28), reason="for CPUs with AVX-512 or AVX2"
)

# Images, input channels, output channels, side: of the net, and those that divide unevenly.
SHAPES = [(2, 16, 32, 24), (5, 8, 8, 4), (2, 24, 40, 12), (1, 8, 16, 32)]
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(params=["this CPU's vectors", "8 lanes, 16 registers"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The functions for this CPU, or for one with AVX2."""
    if request.param != "this CPU's vectors":
        monkeypatch.setattr(winograd, "_LANES", 8)
        monkeypatch.setattr(winograd, "_REGISTERS", 16)
    for compiled in (winograd._convolution, winograd._weight_sums):
        compiled.cache_clear()
    yield
    for compiled in (winograd._convolution, winograd._weight_sums):
        compiled.cache_clear()


class Case:
    """Random images, filters and gradients, and their exact results."""

    def __init__(self, batch: int, inputs: int, outputs: int, side: int, order: str = "C") -> None:
        generator = np.random.default_rng(side)
        draw = generator.standard_normal
        self.x = draw((batch, side, side, inputs)).astype(np.float32)
        self.weight = draw((outputs, inputs, 3, 3)).astype(np.float32)
        self.bias = draw(outputs).astype(np.float32)
        self.gradient = draw((batch, side - 2, side - 2, outputs)).astype(np.float32)
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


@pytest.mark.parametrize("shape", SHAPES)
def test_a_convolution_is_exact_within_float32(
    vectors: None, shape: tuple[int, int, int, int]
) -> None:
    case = Case(*shape)
    out = np.full(case.gradient.shape, np.nan, np.float32)
    winograd.convolve(case.x, case.weight, case.bias, out)
    assert_near(out, case.exact()[0], terms=9 * shape[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_the_images_is_exact_within_float32(
    vectors: None, shape: tuple[int, int, int, int]
) -> None:
    case = Case(*shape)
    out = np.full(case.x.shape, np.nan, np.float32)
    winograd.input_gradient(case.gradient, case.weight, out)
    assert_near(out, case.exact()[1], terms=9 * shape[2])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_the_weight_is_exact_within_float32(
    vectors: None, shape: tuple[int, int, int, int]
) -> None:
    case = Case(*shape)
    found = winograd.weight_gradient(case.x, case.gradient)
    assert_near(found, case.exact()[2], terms=shape[0] * (shape[3] - 2) ** 2)


def test_sums_over_a_whole_batch_are_as_exact_as_torchs() -> None:
    case = Case(128, 16, 32, 24)
    exact = case.exact()[2]
    found = winograd.weight_gradient(case.x, case.gradient)
    x, gradient = (torch.from_numpy(a.transpose(0, 3, 1, 2)) for a in (case.x, case.gradient))
    by_torch = conv2d_weight(x, (32, 16, 3, 3), gradient).numpy()  # type: ignore[no-untyped-call]
    assert np.abs(found - exact).max() < 2 * np.abs(by_torch - exact).max()


def test_a_weight_may_have_any_strides() -> None:
    plain, strided = Case(2, 8, 16, 12), Case(2, 8, 16, 12, order="channels last")
    assert plain.weight.strides != strided.weight.strides
    results = []
    for case in (plain, strided):
        out, of_x = np.empty_like(case.gradient), np.empty_like(case.x)
        winograd.convolve(case.x, case.weight, case.bias, out)
        winograd.input_gradient(case.gradient, case.weight, of_x)
        results.append((out, of_x))
    for one, other in zip(*results, strict=True):
        assert np.array_equal(one, other)


def test_relu_cuts_at_zero_and_keeps_what_is_no_number() -> None:
    case = Case(2, 8, 16, 12)
    case.x[1, 5, 5, 3] = np.nan
    plain, rectified = np.empty_like(case.gradient), np.empty_like(case.gradient)
    winograd.convolve(case.x, case.weight, case.bias, plain)
    winograd.convolve(case.x, case.weight, case.bias, rectified, relu=True)
    assert np.isnan(plain[1, 3:6, 3:6]).all()
    assert np.array_equal(rectified, np.where(plain < 0, 0, plain), equal_nan=True)


def test_equal_inputs_give_equal_bits() -> None:
    case = Case(3, 16, 32, 20)
    first, second = np.empty_like(case.gradient), np.empty_like(case.gradient)
    for out in (first, second):
        winograd.convolve(case.x.copy(), case.weight.copy(), case.bias, out)
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "side"),
    [(1, 8, 3, 28), (8, 12, 3, 28), (32, 8, 1, 22), (16, 32, 5, 24), (8, 16, 3, 9)],
)
def test_what_it_cannot_do_is_left_to_torch(
    inputs: int, outputs: int, kernel: int, side: int
) -> None:
    assert not winograd.applies(inputs, outputs, kernel, side)
