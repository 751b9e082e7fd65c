"""A training run on the CPU."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from tune_mnist.mnist.augment import amounts_of, augments, distort
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Split
from tune_mnist.mnist.epoch import Epoch, StepListener, draw_net, draw_order, draw_seeds
from tune_mnist.mnist.evaluation import Score, evaluate
from tune_mnist.mnist.fused import training_forward
from tune_mnist.mnist.losses import first_not_finite, smoothed_loss
from tune_mnist.mnist.optim import Average, build_optimizer, learning_rates
from tune_mnist.mnist.tensors import SplitTensors, normalised, scaled

DIVERGENCE_CHECK_EVERY = 32  # steps


class HostRun:
    """The moving parts of one training run."""

    def __init__(self, config: TrainConfig, split: Split, *, epochs: int, seed: int) -> None:
        self.config, self.data, self.seed = config, SplitTensors.on(split, "cpu"), seed
        self.epochs = epochs
        self.steps = math.ceil(len(split.train_labels) / config.batch_size)
        self.net = draw_net(config, seed)
        self.optimizer = build_optimizer(self.net, config)
        self.average = Average(self.net, config.ema_decay) if config.ema_decay else None
        rates = learning_rates(config, epochs=epochs, steps_per_epoch=self.steps)
        self.rates: list[float] = rates.tolist()

    def train_epoch(self, done: int, on_step: StepListener | None) -> Epoch:
        """Train one more epoch than are done, and evaluate unless it diverged."""
        began = time.perf_counter()
        losses = self._take_steps(done, on_step)
        trained = time.perf_counter()
        val, test = Score(), Score()
        if first_not_finite(losses) is None:
            net = self.net if self.average is None else self.average.net
            val = evaluate(net, self.data.val_images, self.data.val_labels)
            test = evaluate(net, self.data.test_images, self.data.test_labels)
        return Epoch(
            losses,
            val,
            test,
            seconds=trained - began,
            evaluation_seconds=time.perf_counter() - trained,
            state={
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
            },
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from an Epoch's state."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _take_steps(self, done: int, on_step: StepListener | None) -> Tensor:
        """Take an epoch's steps and return their losses, [steps], fewer if one diverged."""
        order_seed, draw_seed = draw_seeds(self.seed, done + 1)
        distorts = augments(self.config, done=done, epochs=self.epochs)
        order = draw_order(len(self.data.train_labels), order_seed)
        generator = torch.Generator().manual_seed(draw_seed)
        rates = self.rates[done * self.steps :]
        losses = torch.zeros(self.steps)
        self.net.train()
        for step, batch in enumerate(torch.split(order, self.config.batch_size), start=1):
            loss = self._take_step(batch, rates[step - 1], generator, distorts)
            losses[step - 1] = loss
            if on_step is not None:
                on_step(step, loss)
            if step % DIVERGENCE_CHECK_EVERY == 0 and not losses[:step].isfinite().all():
                return losses[:step]
        return losses

    def _take_step(
        self, batch: Tensor, rate: float, generator: torch.Generator, distorts: bool
    ) -> Tensor:
        """Move the weights once along the gradient of a batch, int64 [B], and return its loss."""
        config = self.config
        images = scaled(self.data.train_images[batch])
        if distorts:
            amounts = amounts_of(config)
            images = distort(images, amounts, generator, bends=config.elastic > 0)
        log_probs = training_forward(self.net, normalised(images), config.dropout, generator)
        loss = smoothed_loss(log_probs, self.data.train_labels[batch], config.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return loss.detach()
