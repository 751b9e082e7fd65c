"""One training step: images, distortion, forward, loss, gradient, and what moves the weights.

It serves any device and reads no value back from it. All that differs between two steps of a kind
comes in by `batch` and `row`, so whoever records a step once (`cuda.captured`) may replay it for
every later epoch and run of its kind. Net, average and optimizer each lie in one vector, so that
few large operations move them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tune_mnist.mnist.config import Optimizer, TrainConfig
from tune_mnist.mnist.forward import smoothed_loss
from tune_mnist.mnist.images import (
    Amounts,
    SplitTensors,
    amounts_of,
    augments,
    distort,
    normalised,
    scaled,
)
from tune_mnist.mnist.net import Net

Floats = npt.NDArray[np.floating]
Columns = dict[str, Floats | float]  # by name, a number for each step, or one for all

# Smith & Topin, arXiv 1708.07120, with the factors of torch.optim.lr_scheduler.OneCycleLR.
ONECYCLE_START = 1 / 25
ONECYCLE_END = 1 / 25 / 1e4
ADAMW_EPS = 1e-8  # torch's own default


def learning_rates(config: TrainConfig, *, epochs: int, steps_per_epoch: int) -> Floats:
    """Return the learning rate of every step of the run, [epochs * steps_per_epoch].

    A table instead of torch's schedulers: it has no state to save, and a run that resumes in the
    middle continues where it stopped. Values equal those schedulers' (StepLR once an epoch,
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
    """Return what the running average keeps of itself at its next step, after so many.

    The decay grows to its value as (1 + n) / (10 + n), so that the random start is forgotten at
    once (TensorFlow's ExponentialMovingAverage with num_updates).
    """
    return np.minimum(decay, (1 + steps) / (10 + steps))


class FlatNet:
    """A net whose numbers lie in one vector, so that few large operations reach all of them.

    In `vector` the weights come first and batch norm's statistics last. Parts with four dimensions
    lie channels last. Batches seen by batch norm are not counted.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.device("meta"):  # draws no weights
            self.net = Net()
        for layer in self.net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.num_batches_tracked = None
        weights = dict(self.net.named_parameters())
        parts = weights | dict(self.net.named_buffers())
        self._shapes = {name: part.shape for name, part in parts.items()}
        self.vector = torch.zeros(sum(part.numel() for part in parts.values()), device=device)
        self.weights = self.vector[: sum(part.numel() for part in weights.values())]
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
                views[name] = part.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
            else:
                views[name] = part.view(shape)
        return views

    def copy_from(self, state: Mapping[str, Tensor]) -> None:
        for name, part in self.named(self.vector).items():
            part.copy_(state[name])

    def state_dict(self, vector: Tensor, batches: int) -> dict[str, Tensor]:
        """Give a vector made like `vector` the form of `Net`'s state_dict after some batches."""
        found = self.named(vector)
        norms = [name.removesuffix("running_mean") for name in found if "running_mean" in name]
        return found | {f"{name}num_batches_tracked": torch.tensor(batches) for name in norms}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenate tensors in the layout that FlatNet gives them."""
    return torch.cat(
        [(each.permute(0, 2, 3, 1) if each.dim() == 4 else each).reshape(-1) for each in tensors]
    )


# torch's SGD and AdamW on one vector, with every hyperparameter a scalar tensor on its device, so
# that a captured step can serve other rates and trials. On a CPU torch's own classes would do, but
# the first of them that a process makes imports torch's compiler: a worker's first step was done
# 4.5 s after its start, and 3.1 s without (AMD EPYC, busy, one look each).
#
# `buffers` is an optimizer's memory, vectors as long as the weights, by torch's names. `columns`
# returns what `update` reads, for as many steps as there are rates, after some taken.


class FlatSGD:
    """torch.optim.SGD."""

    def __init__(self, weights: Tensor) -> None:
        self._weights, self._sum = weights, torch.zeros_like(weights)
        self.buffers = {"momentum_buffer": self._sum}

    @staticmethod
    def columns(config: TrainConfig, rates: Floats, taken: int) -> Columns:
        return {
            "lr": rates,
            "momentum": config.momentum,
            "weight_decay": config.weight_decay,
            "by_gradient": 1.0 if config.nesterov else 0.0,
            "by_sum": config.momentum if config.nesterov else 1.0,
        }

    def update(self, gradient: Tensor, numbers: Mapping[str, Tensor]) -> None:
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
        self._weights.mul_(numbers["shrink"])
        self._mean.lerp_(gradient, numbers["new_in_mean"])
        self._square.mul_(numbers["old_in_square"])
        self._square.addcmul_(gradient * gradient, numbers["new_in_square"])
        root = self._square.sqrt().mul_(numbers["correction"]).add_(ADAMW_EPS)
        self._weights.addcdiv_(self._mean * numbers["step_size"], root, value=-1)


FlatOptimizer = FlatSGD | FlatAdamW
FLAT_OPTIMIZERS: dict[Optimizer, type[FlatOptimizer]] = {"sgd": FlatSGD, "adamw": FlatAdamW}


def constants(config: TrainConfig) -> dict[str, float]:
    """Return what every step of a run goes by alike, without the optimizer's numbers."""
    return {
        "dropout": config.dropout,
        "label_smoothing": config.label_smoothing,
        **amounts_of(config)._asdict(),
    }


def step_columns(config: TrainConfig, rates: Floats, taken: int) -> Columns:
    """Return what steps go by, of so many rates, after so many steps of the run."""
    step = taken + np.arange(len(rates))
    return {
        **constants(config),
        # Without an average all of it is new, so that it is the net itself.
        "new_in_average": 1 - averaging_decay(config.ema_decay, step),
        **FLAT_OPTIMIZERS[config.optimizer].columns(config, rates, taken),
    }


def step_table(config: TrainConfig, rates: Floats, taken: int) -> Tensor:
    """Return `step_columns` as a table, a row for each step, on the CPU."""
    columns = step_columns(config, rates, taken).values()
    table = np.column_stack([np.broadcast_to(column, len(rates)) for column in columns])
    return torch.from_numpy(table).to(torch.get_default_dtype())


def table_columns(optimizer: Optimizer) -> list[str]:
    return list(step_columns(TrainConfig(optimizer=optimizer), np.ones(1), 0))


# `forward.training_forward`, with a backend or a precision of its own.
Forward = Callable[[Net, Tensor, float | Tensor, torch.Generator], Tensor]
# What takes a step: a batch, int64 [B], and its row of the table -> its loss.
Take = Callable[[Tensor, Tensor], Tensor]


class StepKind(NamedTuple):
    """What the operations of a step depend on; every other hyperparameter is data."""

    optimizer: Optimizer
    distorts: bool  # images; without, none of it is computed
    bends: bool  # them as well

    @classmethod
    def of(cls, config: TrainConfig, *, done: int, epochs: int) -> "StepKind":
        """Return the kind of the steps of the epoch after `done`."""
        distorts = augments(config, done=done, epochs=epochs)
        return cls(config.optimizer, distorts, distorts and config.elastic > 0)


class Step:
    """A net, its running average, its optimizer's memory, and the step that moves them.

    At first all are zeros: `checkpoint.put_state` fills them. The images in `data` may be
    exchanged in place. `known` are hyperparameters whose values the host may look at, over those
    of a row: a CPU computes nothing for a dropout or a smoothing of 0.
    """

    def __init__(
        self,
        kind: StepKind,
        data: SplitTensors,
        generator: torch.Generator,
        forward: Forward,
        known: Mapping[str, float],
    ) -> None:
        self.data, self.generator = data, generator
        self._kind, self._forward, self._known = kind, forward, known
        self.net, self.average = FlatNet(data.device), FlatNet(data.device)
        self.optimizer: FlatOptimizer = FLAT_OPTIMIZERS[kind.optimizer](self.net.weights)
        self.columns = table_columns(kind.optimizer)

    @property
    def vectors(self) -> list[Tensor]:
        return [self.net.vector, self.average.vector, *self.optimizer.buffers.values()]

    def take(self, batch: Tensor, row: Tensor) -> Tensor:
        """Move everything once along the gradient of a batch, and return its loss."""
        numbers: dict[str, Any] = dict(zip(self.columns, row.unbind(), strict=True))
        numbers |= self._known
        images = scaled(self.data.train_images.index_select(0, batch))
        labels = self.data.train_labels.index_select(0, batch)
        if self._kind.distorts:
            amounts = Amounts(*(numbers[name] for name in Amounts._fields))
            images = distort(images, amounts, self.generator, bends=self._kind.bends)
        log_probs = self._forward(
            self.net.net, normalised(images), numbers["dropout"], self.generator
        )
        loss = smoothed_loss(log_probs, labels, numbers["label_smoothing"])
        gradients = torch.autograd.grad(loss, self.net.parameters)
        with torch.no_grad():
            self.optimizer.update(flat(gradients), numbers)
            self.average.vector.lerp_(self.net.vector, numbers["new_in_average"])
        return loss.detach()
