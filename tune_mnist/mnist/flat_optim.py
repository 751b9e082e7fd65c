"""torch's SGD and AdamW on one vector, with every hyperparameter a tensor on its device.

So a captured step can serve other rates and trials. On a CPU torch's own classes would do, but the
first of them that a process makes imports torch's compiler: a worker's first step was done 4.5 s
after its start, and 3.1 s without (AMD EPYC, busy, one look each).
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tune_mnist.mnist.config import Optimizer, TrainConfig
from tune_mnist.mnist.optim import Floats

_EPS = 1e-8  # torch's own default for AdamW

Columns = dict[str, Floats | float]  # a number for each step, or one for all


class FlatOptimizer(Protocol):
    """What moves the weights."""

    buffers: dict[str, Tensor]  # its memory, vectors as long as the weights, by torch's names

    @staticmethod
    def columns(config: TrainConfig, rates: Floats, taken: int) -> Columns:
        """Return what `update` reads, for as many steps as there are rates, after some taken."""

    def update(self, gradient: Tensor, numbers: Mapping[str, Tensor]) -> None:
        """Move the weights along a gradient, by scalar tensors named as the columns are."""


class FlatSGD:
    """torch.optim.SGD."""

    def __init__(self, weights: Tensor) -> None:
        self._weights, self._sum = weights, torch.zeros_like(weights)
        self.buffers = {"momentum_buffer": self._sum}

    @staticmethod
    def columns(config: TrainConfig, rates: Floats, taken: int) -> Columns:
        """Return what `update` reads."""
        return {
            "lr": rates,
            "momentum": config.momentum,
            "weight_decay": config.weight_decay,
            "by_gradient": 1.0 if config.nesterov else 0.0,
            "by_sum": config.momentum if config.nesterov else 1.0,
        }

    def update(self, gradient: Tensor, numbers: Mapping[str, Tensor]) -> None:
        """Move the weights."""
        gradient = torch.addcmul(gradient, self._weights, numbers["weight_decay"])
        self._sum.mul_(numbers["momentum"]).add_(gradient)
        direction = gradient * numbers["by_gradient"] + self._sum * numbers["by_sum"]
        self._weights.addcmul_(direction, numbers["lr"], value=-1)


class FlatAdamW:
    """torch.optim.AdamW."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self._mean, self._square = torch.zeros_like(weights), torch.zeros_like(weights)
        self.buffers = {"exp_avg": self._mean, "exp_avg_sq": self._square}

    @staticmethod
    def columns(config: TrainConfig, rates: Floats, taken: int) -> Columns:
        """Return what `update` reads."""
        step = taken + 1 + np.arange(len(rates))
        return {
            "shrink": 1 - rates * config.weight_decay,
            "new_in_mean": 1 - config.beta1,
            "old_in_square": config.beta2,
            "new_in_square": 1 - config.beta2,
            "step_size": rates / (1 - config.beta1**step),
            "correction": (1 - config.beta2**step) ** -0.5,
        }

    def update(self, gradient: Tensor, numbers: Mapping[str, Tensor]) -> None:
        """Move the weights."""
        self._weights.mul_(numbers["shrink"])
        self._mean.lerp_(gradient, numbers["new_in_mean"])
        self._square.mul_(numbers["old_in_square"])
        self._square.addcmul_(gradient * gradient, numbers["new_in_square"])
        root = self._square.sqrt().mul_(numbers["correction"]).add_(_EPS)
        self._weights.addcdiv_(self._mean * numbers["step_size"], root, value=-1)


def as_table(columns: Columns, steps: int) -> Tensor:
    """Return what each of so many steps goes by, float64 [steps, columns]."""
    return torch.from_numpy(
        np.column_stack([np.broadcast_to(column, steps) for column in columns.values()])
    )


FLAT_OPTIMIZERS: dict[Optimizer, type[FlatSGD] | type[FlatAdamW]] = {
    "sgd": FlatSGD,
    "adamw": FlatAdamW,
}
