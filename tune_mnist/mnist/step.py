"""One training step: images, distortion, forward, loss, gradient, update, average.

It serves any device and reads no value back from it. All that differs between two steps of a kind
comes in by `batch` and `row`, so whoever records a step once (`cuda.captured`) may replay it for
every later epoch and run of its kind.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tune_mnist.mnist.config import Optimizer, TrainConfig
from tune_mnist.mnist.forward import smoothed_loss
from tune_mnist.mnist.images import Amounts, SplitTensors, augments, distort, normalised, scaled
from tune_mnist.mnist.net import Net
from tune_mnist.mnist.optim import FLAT_OPTIMIZERS, FlatNet, FlatOptimizer, flat, table_columns

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
