"""What every step goes by: its learning rate, and how much of it the average takes in."""

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tune_mnist.mnist.config import Optimizer, TrainConfig
from tune_mnist.mnist.net import Net

Floats = npt.NDArray[np.floating]

# Smith & Topin, arXiv 1708.07120, with the factors of torch.optim.lr_scheduler.OneCycleLR.
ONECYCLE_START = 1 / 25
ONECYCLE_END = 1 / 25 / 1e4


def learning_rates(config: TrainConfig, *, epochs: int, steps_per_epoch: int) -> Floats:
    """Return the learning rate of every step of the run, [epochs * steps_per_epoch].

    A table instead of torch's schedulers: it has no state to save, and a run that resumes in the
    middle reads on where it stopped. Values equal those schedulers' (StepLR once an epoch,
    CosineAnnealingLR and OneCycleLR once a step); the momentum is left alone.
    """
    total = epochs * steps_per_epoch
    step = np.arange(total)
    match config.schedule:
        case "constant":
            factor: Floats = np.ones(total)
        case "step":
            factor = config.step_factor ** (step // steps_per_epoch // config.step_every)
        case "cosine":
            factor = _cosine(1.0, 0.0, step / total)
        case "onecycle":
            peak = config.peak_position * total - 1
            end = total - 1
            rise = _cosine(ONECYCLE_START, 1.0, step / max(peak, 1e-9))
            fall = _cosine(1.0, ONECYCLE_END, (step - peak) / max(end - peak, 1e-9))
            factor = np.where(step <= peak, rise, fall)
    return config.lr * factor


def _cosine(start: float, end: float, progress: Floats) -> Floats:
    """Go from `start` at progress 0 to `end` at progress 1 along half a cosine."""
    way: Floats = end + (start - end) / 2 * (1 + np.cos(np.pi * progress))
    return way


def averaging_decay(decay: float, steps: npt.NDArray[np.integer]) -> Floats:
    """Return what an average keeps of itself at its next step, after so many.

    The decay grows to its value as (1 + n) / (10 + n), so that the random start is forgotten at
    once (TensorFlow's ExponentialMovingAverage with num_updates).
    """
    return np.minimum(decay, (1 + steps) / (10 + steps))


# MERGED-DOC mnist.flat_net: A net all of whose numbers lie in one vector, so that few large
# operations reach all of them.


class FlatNet:
    """A net on a device, its weights first and batch norm's statistics last in `vector`.

    Parts with four dimensions lie channels last. Batches seen by batch norm are not counted.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.device("meta"):  # draws no weights
            self.net = Net()
        for layer in self.net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.num_batches_tracked = None
        weights = {name: each.shape for name, each in self.net.named_parameters()}
        statistics = {name: each.shape for name, each in self.net.named_buffers()}
        self._shapes = weights | statistics
        self.vector = torch.zeros(_size(self._shapes), device=device)
        self.weights = self.vector[: _size(weights)]
        for name, part in self.named(self.vector).items():
            owner, _, attribute = name.rpartition(".")
            layer = self.net.get_submodule(owner)
            # `data` counts changes by itself: autograd need not mind that other parts of the
            # vector change between forward and backward.
            setattr(layer, attribute, nn.Parameter(part.data) if name in weights else part.data)
        self.parameters = list(self.net.parameters())

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """View a vector made like `vector` or `weights` by the names of a state_dict."""
        views, start = {}, 0
        for name, shape in self._shapes.items():
            if start == len(vector):
                break
            part = vector[start : start + math.prod(shape)]
            start += len(part)
            if len(shape) == 4:
                count, channels, height, width = shape
                views[name] = part.view(count, height, width, channels).permute(0, 3, 1, 2)
            else:
                views[name] = part.view(shape)
        return views

    def copy_from(self, state: Mapping[str, Tensor]) -> None:
        """Take over the numbers of a state_dict of `Net`."""
        for name, part in self.named(self.vector).items():
            part.copy_(state[name])

    def state_dict(self, vector: Tensor, batches: int) -> dict[str, Tensor]:
        """Give a vector made like `vector` the form of `Net`'s state_dict after some batches."""
        found = self.named(vector)
        norms = [name.removesuffix("running_mean") for name in found if "running_mean" in name]
        return found | {f"{name}num_batches_tracked": torch.tensor(batches) for name in norms}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Put tensors into one vector in the order that FlatNet's have there."""
    return torch.cat(
        [(each.permute(0, 2, 3, 1) if each.dim() == 4 else each).reshape(-1) for each in tensors]
    )


def _size(shapes: Mapping[str, torch.Size]) -> int:
    return sum(map(math.prod, shapes.values()))


# MERGED-DOC mnist.flat_optim: torch's SGD and AdamW on one vector, with every hyperparameter a
# tensor on its device. So a captured step can serve other rates and trials. On a CPU torch's own
# classes would do, but the first of them that a process makes imports torch's compiler: a worker's
# first step was done 4.5 s after its start, and 3.1 s without (AMD EPYC, busy, one look each).

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
