from typing import Any

import pytest
import torch
from torch import nn

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.config import (
    Precision,
    TrainConfig,
    check_precision,
    forward_in,
    products_in,
)
from tune_mnist.mnist.data import Mnist, split
from tune_mnist.mnist.training import train
from tune_mnist.tuning import packing as sharing
from tune_mnist.tuning.packing import settle_resources
from tune_mnist.tuning.resources import TrialResources
from tune_mnist.tuning.settings import SearchSettings


def settings_of_torch() -> tuple[str, str]:
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize(
    ("precision", "expected"), [("float32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")]
)
def test_products_are_exact_unless_tf32_is_asked_for(precision: Precision, expected: str) -> None:
    before = settings_of_torch()
    with pytest.raises(KeyboardInterrupt), products_in(precision):
        assert settings_of_torch() == (expected, expected)
        raise KeyboardInterrupt
    assert settings_of_torch() == before


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("float32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)],
)
def test_forward_passes_compute_as_asked(precision: Precision, expected: torch.dtype) -> None:
    with forward_in(precision, "cpu"):
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == expected


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_cpu_computes_in_float32_only(
    precision: Precision, small_mnist: Mnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_precision(precision, "cuda")
    data = split(small_mnist, holdout=True, images=10)
    with pytest.raises(ConfigError, match=f"{precision} is for GPUs"):
        next(train(TrainConfig(), data, epochs=1, seed=0, precision=precision))
    # A search says so before it starts.
    monkeypatch.setattr(sharing, "_asked", lambda _: TrialResources(cpus=1, gpus=0))
    with pytest.raises(ConfigError, match=f"--precision {precision}"):
        settle_resources(SearchSettings(), data, precision)
    monkeypatch.setattr(sharing, "_asked", lambda _: TrialResources(cpus=1, gpus=0.25))
    assert settle_resources(SearchSettings(), data, precision).gpus == 0.25
