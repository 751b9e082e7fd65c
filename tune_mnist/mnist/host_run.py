"""A training run on the CPU."""

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Split
from tune_mnist.mnist.epoch import Epoch, StepListener, draw_order, draw_seeds
from tune_mnist.mnist.evaluation import Score, evaluate
from tune_mnist.mnist.fused import training_forward
from tune_mnist.mnist.images import SplitTensors, amounts_of, augments, distort, normalised, scaled
from tune_mnist.mnist.losses import first_not_finite, smoothed_loss
from tune_mnist.mnist.optim import (
    FLAT_OPTIMIZERS,
    FlatNet,
    FlatOptimizer,
    as_table,
    averaging_decay,
    flat,
    learning_rates,
)
from tune_mnist.mnist.run_state import initial_state, put_state, state_of, vectors_of

DIVERGENCE_CHECK_EVERY = 32  # steps


class HostRun:
    """The moving parts of one training run."""

    def __init__(self, config: TrainConfig, split: Split, *, epochs: int, seed: int) -> None:
        self.config, self.data, self.seed = config, SplitTensors.on(split, "cpu"), seed
        self.epochs = epochs
        self.steps = math.ceil(len(split.train_labels) / config.batch_size)
        self.rates = learning_rates(config, epochs=epochs, steps_per_epoch=self.steps)
        self.net, self.average = (FlatNet(torch.device("cpu")) for _ in range(2))
        self.optimizer: FlatOptimizer = FLAT_OPTIMIZERS[config.optimizer](self.net.weights)
        self.load_state_dict(initial_state(config, seed))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from an Epoch's state."""
        put_state(state, self)

    def train_epoch(self, done: int, on_step: StepListener | None) -> Epoch:
        """Train one more epoch than are done, and evaluate unless it diverged."""
        began = time.perf_counter()
        losses = self._take_steps(done, on_step)
        trained = time.perf_counter()
        val, test = Score(), Score()
        if first_not_finite(losses) is None:
            net = (self.average if self.config.ema_decay else self.net).net
            val = evaluate(net, self.data.val_images, self.data.val_labels)
            test = evaluate(net, self.data.test_images, self.data.test_labels)
        vectors = [vector.clone() for vector in vectors_of(self)]
        return Epoch(
            losses,
            val,
            test,
            seconds=trained - began,
            evaluation_seconds=time.perf_counter() - trained,
            state=state_of(self, vectors, self.config, done * self.steps + len(losses)),
        )

    def _take_steps(self, done: int, on_step: StepListener | None) -> Tensor:
        """Take an epoch's steps and return their losses, [steps], fewer if one diverged."""
        order_seed, draw_seed = draw_seeds(self.seed, done + 1)
        distorts = augments(self.config, done=done, epochs=self.epochs)
        order = draw_order(len(self.data.train_labels), order_seed)
        generator = torch.Generator().manual_seed(draw_seed)
        numbers = self._numbers_by_step(done * self.steps)
        kept = averaging_decay(self.config.ema_decay, done * self.steps + np.arange(self.steps))
        losses = torch.zeros(self.steps)
        for step, batch in enumerate(torch.split(order, self.config.batch_size), start=1):
            loss, gradient = self._differentiate(batch, generator, distorts)
            self.optimizer.update(gradient, numbers[step - 1])
            if self.config.ema_decay:
                self.average.vector.lerp_(self.net.vector, float(1 - kept[step - 1]))
            losses[step - 1] = loss
            if on_step is not None:
                on_step(step, loss)
            if step % DIVERGENCE_CHECK_EVERY == 0 and not losses[:step].isfinite().all():
                return losses[:step]
        return losses

    def _numbers_by_step(self, taken: int) -> list[dict[str, Tensor]]:
        """Return what the optimizer goes by in each step of an epoch, after so many of the run."""
        rates = self.rates[taken : taken + self.steps]
        columns = self.optimizer.columns(self.config, rates, taken)
        table = as_table(columns, self.steps).to(torch.get_default_dtype())
        return [dict(zip(columns, row.unbind(), strict=True)) for row in table]

    def _differentiate(
        self, batch: Tensor, generator: torch.Generator, distorts: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, int64 [B], and its gradient, as long as the weights."""
        config = self.config
        images = scaled(self.data.train_images[batch])
        if distorts:
            amounts = amounts_of(config)
            images = distort(images, amounts, generator, bends=config.elastic > 0)
        log_probs = training_forward(self.net.net, normalised(images), config.dropout, generator)
        loss = smoothed_loss(log_probs, self.data.train_labels[batch], config.label_smoothing)
        gradients = torch.autograd.grad(loss, self.net.parameters)
        return loss.detach(), flat(gradients)
