"""The training step on a device, on buffers that never move.

So it can be captured as a CUDA graph once and serve every later epoch and run of its kind: all
that may differ between two steps is read from the device, most of it from one row of a table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tune_mnist.mnist.config import Optimizer, Precision, TrainConfig, forward_in, products_in
from tune_mnist.mnist.fused import training_forward
from tune_mnist.mnist.graphs import capture
from tune_mnist.mnist.images import Amounts, SplitTensors, amounts_of, distort, normalised, scaled
from tune_mnist.mnist.losses import smoothed_loss
from tune_mnist.mnist.optim import (
    FLAT_OPTIMIZERS,
    Columns,
    FlatNet,
    FlatOptimizer,
    Floats,
    as_table,
    averaging_decay,
    flat,
)


class StepKind(NamedTuple):
    """What two runs must agree in to use the same captured step."""

    optimizer: Optimizer
    batch_size: int
    distorts: bool  # images; without, none of it is computed
    bends: bool  # them as well
    precision: Precision
    captured: bool  # as a CUDA graph, else done operation by operation


class DeviceStep:
    """A net, its average, its optimizer's memory and the step that moves them."""

    def __init__(
        self, kind: StepKind, data: SplitTensors, generator: torch.Generator, pool: Any
    ) -> None:
        """Prepare the step; what the buffers hold then means nothing.

        Args:
            kind: what is fixed.
            data: the images, which may be exchanged in place.
            generator: draws distortions and masks; shared by all steps of a device.
            pool: where captured steps have what they compute with; likewise.
        """
        self.kind, self._data, self._generator = kind, data, generator
        device, images = data.device, len(data.train_labels)
        whole = images // kind.batch_size
        self.steps = -(-images // kind.batch_size)
        self.net, self.average = FlatNet(device), FlatNet(device)
        self.optimizer: FlatOptimizer = FLAT_OPTIMIZERS[kind.optimizer](self.net.weights)
        self.losses = torch.zeros(self.steps, device=device)  # of the epoch's steps
        self._taken = torch.zeros(1, dtype=torch.int64, device=device)  # of the epoch's steps
        self._order = torch.zeros(images, dtype=torch.int64, device=device)
        self._columns = list(step_columns(TrainConfig(optimizer=kind.optimizer), np.ones(1), 0))
        self._table = torch.zeros(self.steps, len(self._columns), device=device)

        batches = self._order[: whole * kind.batch_size].view(whole, kind.batch_size)
        rest = self._order[whole * kind.batch_size :]
        works = [lambda: self._step(batches.index_select(0, self._taken)[0])] * (whole > 0)
        # The last batch, where it is smaller: batch norm's statistics are to be its own.
        works += [lambda: self._step(rest)] * (len(rest) > 0)
        starts: list[Callable[[], None]] = works
        if kind.captured:
            with products_in(kind.precision):
                starts = [capture(work, self._taken.zero_, generator, pool) for work in works]
        self._starts = [starts[0]] * whole + [starts[-1]] * (len(rest) > 0)

    def begin_epoch(self, order: Tensor, columns: Columns, seed: int) -> None:
        """Set what the next epoch's steps go by.

        Args:
            order: of the training images, int64 [N], on the CPU.
            columns: of `step_columns`, for the epoch's steps.
            seed: of distortions and masks.
        """
        self._order.copy_(order)
        ordered = {name: columns[name] for name in self._columns}
        self._table.copy_(as_table(ordered, self.steps))
        self._taken.zero_()
        self._generator.manual_seed(seed)

    def take(self, step: int) -> None:
        """Take a step of the epoch, 0-based; they are to be taken in order."""
        self._starts[step]()

    def _step(self, batch: Tensor) -> None:
        """Move everything once along the gradient of a batch, int64 [B]; reads no value."""
        row = self._table.index_select(0, self._taken)[0]
        numbers = dict(zip(self._columns, row.unbind(), strict=True))
        images = scaled(self._data.train_images.index_select(0, batch))
        labels = self._data.train_labels.index_select(0, batch)
        if self.kind.distorts:
            amounts = Amounts(*(numbers[name] for name in Amounts._fields))
            images = distort(images, amounts, self._generator, bends=self.kind.bends)
        with forward_in(self.kind.precision, batch.device.type):
            log_probs = training_forward(
                self.net.net, normalised(images), numbers["dropout"], self._generator
            )
        loss = smoothed_loss(log_probs, labels, numbers["label_smoothing"])
        gradients = torch.autograd.grad(loss, self.net.parameters)
        with torch.no_grad():
            self.optimizer.update(flat(gradients), numbers)
            self.average.vector.lerp_(self.net.vector, numbers["new_in_average"])
            self.losses.index_copy_(0, self._taken, loss.view(1))
            self._taken.add_(1)


def step_columns(config: TrainConfig, rates: Floats, taken: int) -> Columns:
    """Return what steps go by, of so many rates, after so many steps of the run."""
    step = taken + np.arange(len(rates))
    return {
        "dropout": config.dropout,
        "label_smoothing": config.label_smoothing,
        **amounts_of(config)._asdict(),
        # Without an average: all of it is new, so that it is the net itself.
        "new_in_average": 1 - averaging_decay(config.ema_decay, step),
        **FLAT_OPTIMIZERS[config.optimizer].columns(config, rates, taken),
    }
