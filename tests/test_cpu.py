"""The door to a CPU's compiled code: it is used where it is right, and never where it is not."""

import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tune_mnist.mnist import cpu
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.cpu import backend
from tune_mnist.mnist.data import Mnist, split
from tune_mnist.mnist.forward import TORCH
from tune_mnist.mnist.net import Net
from tune_mnist.mnist.training import EpochResult, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Have compiled code checked as at its first use."""
    cpu._compiled.cache_clear()
    yield
    cpu._compiled.cache_clear()


@pytest.fixture
def loops() -> Any:
    pytest.importorskip("numba")
    from tune_mnist.mnist.cpu import loops

    return loops


def trained(mnist: Mnist) -> EpochResult:
    data = split(mnist, holdout=True, images=40)
    return next(train(TrainConfig(batch_size=16), data, epochs=1, seed=1))


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_code_that_is_right_is_used_without_a_word(threads: int) -> None:
    net, before = Net(), torch.get_rng_state()
    assert backend(net, threads) is not TORCH
    assert torch.equal(torch.get_rng_state(), before)


def scaled_by(factor: float, of: Callable[..., Any]) -> Callable[..., Any]:
    """What a function returns, a little too large."""

    def damaged(*arguments: Any) -> Any:
        found = of(*arguments)
        parts = tuple(each * factor for each in (found if isinstance(found, tuple) else [found]))
        return parts if isinstance(found, tuple) else parts[0]

    return damaged


@pytest.mark.parametrize(
    "kernel", ["moments", "norm_backward_sums", "norm_and_relu_backward", "draw_keep"]
)
def test_a_wrong_kernel_is_found_told_once_and_trains_nothing(
    kernel: str, loops: Any, small_mnist: Mnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_compiled", lambda one_thread: TORCH)
        expected = trained(small_mnist)

    damaged = scaled_by(1.003, getattr(loops, kernel))
    if kernel == "draw_keep":
        damaged = lambda seed, dropout, keep: keep.fill(1)  # noqa: E731
    monkeypatch.setattr(loops, kernel, damaged)
    with pytest.warns(RuntimeWarning) as told:
        found = [trained(small_mnist) for _ in range(2)]
    assert len(told) == 1
    assert "the compiled kernels are not used on this CPU: their" in str(told[0].message)
    assert [result.weights for result in found] == [expected.weights] * 2
    assert found[0].metrics.test_loss == expected.metrics.test_loss


def test_a_wrong_convolution_is_found(
    loops: Any, small_mnist: Mnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tune_mnist.mnist.cpu import llvm

    if not llvm.LANES:
        pytest.skip("for CPUs with AVX-512 or AVX2")
    multiply = llvm.weight_sums_of_tiles

    def damaged(*shape: int) -> Callable[..., None]:
        def loop(x: Any, gradient: Any, sums: Any, scratch: Any) -> None:
            multiply(*shape)(x, gradient, sums, scratch)
            sums[0, 0] += 0.01 * abs(sums).max()

        return loop

    monkeypatch.setattr(llvm, "weight_sums_of_tiles", damaged)
    with pytest.warns(RuntimeWarning, match=r"their gradient of \d+\.weight is off by"):
        assert backend(Net(), threads=1) is TORCH
    assert backend(Net(), threads=2) is not TORCH  # which uses none of it


def test_a_kernel_that_fails_is_told_and_not_used(
    loops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "max_pool", Mock(side_effect=OSError("no code for\nthis machine")))
    told = "they fail with OSError: no code for this machine; torch"
    with pytest.warns(RuntimeWarning, match=told):
        assert backend(Net(), threads=1) is TORCH


@pytest.mark.filterwarnings("error")
def test_without_numba_or_for_other_nets_torch_computes_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert backend(Net().double(), threads=1) is TORCH
    assert backend(Net().to("meta"), threads=1) is TORCH
    for name in ("convolution", "features", "llvm", "loops"):
        monkeypatch.delitem(sys.modules, f"tune_mnist.mnist.cpu.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert backend(Net(), threads=1) is TORCH
