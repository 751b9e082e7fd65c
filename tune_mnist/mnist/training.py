"""One training run: a generator that yields an EpochResult after every epoch.

The train command, the search's trials, the confirmation and the benchmarks all drive this one
loop. The whole data set lies in memory as bytes; a batch is a slice of a permutation.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.augment import augments, random_affine
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Split
from tune_mnist.mnist.evaluation import Score, evaluate
from tune_mnist.mnist.fused import training_forward
from tune_mnist.mnist.net import Net
from tune_mnist.mnist.optim import Average, build_optimizer, learning_rates
from tune_mnist.mnist.tensors import SplitTensors, normalised, scaled

DIVERGENCE_CHECK_EVERY = 32  # steps; a check waits for the device, so not after every step

StepListener = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class EpochResult:
    """What one epoch came to; accuracies are fractions in [0, 1], losses are means per image.

    Without a holdout the `val_` values are NaN. An epoch that diverged did so at `diverged_step`
    (1-based within the epoch), was not evaluated, and is the last.
    """

    epoch: int  # 1-based, finished
    train_loss: float
    val_loss: float
    val_accuracy: float
    test_loss: float
    test_accuracy: float
    test_correct: int  # of 10,000
    seconds: float  # training time, without the evaluation
    evaluation_seconds: float
    diverged_step: int | None
    state: bytes  # all it takes to go on with the next epoch: see `train`
    weights: bytes  # state_dict of the evaluated net: see `load_weights`

    def metrics(self) -> dict[str, float | int | None]:
        """Return the values that describe the epoch, by name, without the states."""
        return {
            name: value for name, value in vars(self).items() if name not in ("state", "weights")
        }


def train(
    config: TrainConfig,
    split: Split,
    *,
    epochs: int,
    seed: int,
    device: str = "cpu",
    state: bytes | None = None,
    on_step: StepListener | None = None,
) -> Iterator[EpochResult]:
    """Train a fresh net, or go on from a state, and yield each epoch as it finishes.

    Every epoch seeds its own random numbers from (seed, epoch), so that a state needs none and a
    run that was broken off reports what the unbroken one would have, to the last digit on a CPU.

    Args:
        config: the hyperparameters.
        split: the images to train on and to evaluate on.
        epochs: the run's full length, which also stretches the schedule.
        seed: fixes initial weights, order, distortions and dropout (for a number of threads).
        device: "cpu" or "cuda".
        state: the `state` of an earlier EpochResult of the same run.
        on_step: called after each step with the batch's number (1-based) and its loss.

    Raises:
        ConfigError: the state is damaged or belongs to another run.
    """
    run = _Run(config, SplitTensors.on(split, device), epochs=epochs, seed=seed)
    if state is not None:
        run.load(state)
    while run.epoch < epochs:
        result = run.train_epoch(on_step)
        yield result
        if result.diverged_step is not None:
            return


def load_weights(weights: bytes) -> Net:
    """Build the net from an EpochResult's `weights`, ready for inference."""
    net = Net()
    net.load_state_dict(_unpack(weights))
    return net.eval()


def raw_weights(result: EpochResult) -> bytes:
    """Return the weights as the last step left them, which `weights` may be the average of."""
    return _pack(_unpack(result.state)["net"])


class _Run:
    """The moving parts of one training run."""

    def __init__(self, config: TrainConfig, data: SplitTensors, *, epochs: int, seed: int) -> None:
        self.config, self.data, self.seed = config, data, seed
        self.epoch = 0
        self.steps = math.ceil(len(data.train_labels) / config.batch_size)
        net = _initial_net(config, _seeds(seed, epoch=0)[0])
        self.net = net.to(data.device).to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.net, config)
        self.average = Average(self.net, config.ema_decay) if config.ema_decay else None
        rates = learning_rates(config, epochs=epochs, steps_per_epoch=self.steps)
        self.rates: list[float] = rates.tolist()

    @property
    def evaluated(self) -> Net:
        """The net that is evaluated and kept: the averaged one where there is one."""
        return self.net if self.average is None else self.average.net

    def train_epoch(self, on_step: StepListener | None) -> EpochResult:
        """Train one epoch, evaluate, and put both into a result."""
        began = time.perf_counter()
        losses = self._take_steps(on_step)
        train_loss = self._mean_per_image(losses)  # on a GPU: waits for the epoch's last step
        trained = time.perf_counter()
        self.epoch += 1
        val, test = Score(), Score()
        diverged = _first_not_finite(losses)
        if diverged is None:
            data = self.data
            val = evaluate(self.evaluated, data.val_images, data.val_labels)
            test = evaluate(self.evaluated, data.test_images, data.test_labels)
            if val.lost or test.lost:  # the last step did it, or batch norm's statistics
                val, test, diverged = Score(), Score(), len(losses)
        return EpochResult(
            epoch=self.epoch,
            train_loss=train_loss,
            val_loss=val.loss,
            val_accuracy=val.accuracy,
            test_loss=test.loss,
            test_accuracy=test.accuracy,
            test_correct=test.correct,
            seconds=trained - began,
            evaluation_seconds=time.perf_counter() - trained,
            diverged_step=diverged,
            state=self._state(),
            weights=_pack(self.evaluated.state_dict()),
        )

    def _take_steps(self, on_step: StepListener | None) -> Tensor:
        """Take the epoch's steps and return their losses, [steps], fewer if one diverged."""
        order, generator = self._epoch_randomness()
        losses = torch.zeros(self.steps, device=self.data.device)
        self.net.train()
        for step, batch in enumerate(torch.split(order, self.config.batch_size)):
            losses[step] = loss = self._take_step(batch, step, generator)
            if on_step is not None:
                on_step(step + 1, loss)
            done = step + 1
            if done % DIVERGENCE_CHECK_EVERY == 0 and not losses[:done].isfinite().all():
                return losses[:done]
        return losses

    def _take_step(self, batch: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """Move the weights once along the gradient of a batch, int64 [B], and return its loss."""
        config = self.config
        images = scaled(self.data.train_images[batch])
        if augments(config):
            images = random_affine(images, config, generator)
        log_probs = training_forward(self.net, normalised(images), config.dropout, generator)
        loss = _smoothed_loss(log_probs, self.data.train_labels[batch], config.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[self.epoch * self.steps + step]
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return loss.detach()

    def _epoch_randomness(self) -> tuple[Tensor, torch.Generator]:
        """Return the order of the epoch's images, [N], and the generator of its other draws."""
        order_seed, draw_seed = _seeds(self.seed, self.epoch + 1)
        # Drawn on the CPU whatever the device, so that the order is the same everywhere.
        order = torch.randperm(
            len(self.data.train_labels), generator=torch.Generator().manual_seed(order_seed)
        )
        generator = torch.Generator(self.data.device).manual_seed(draw_seed)
        return order.to(self.data.device), generator

    def _mean_per_image(self, losses: Tensor) -> float:
        """Weigh batch losses by their batches' sizes; the last batch may be a smaller one."""
        sizes = torch.full_like(losses, self.config.batch_size)
        if len(losses) == self.steps:
            sizes[-1] = len(self.data.train_labels) - (self.steps - 1) * self.config.batch_size
        return ((losses * sizes).sum() / sizes.sum()).item()

    def _identity(self) -> dict[str, Any]:
        """Say what a state must agree in to be gone on from; not the length of the schedule."""
        images = len(self.data.train_labels)
        return {"config": self.config.as_dict(), "seed": self.seed, "images": images}

    def _state(self) -> bytes:
        return _pack(
            {
                "run": self._identity(),
                "epoch": self.epoch,
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
            }
        )

    def load(self, packed: bytes) -> None:
        """Go on from a state of this run."""
        state = _unpack(packed)
        if not isinstance(state, dict) or state.get("run") != self._identity():
            raise ConfigError(
                "the saved state belongs to another configuration, seed or number of images"
            )
        self.epoch = state["epoch"]
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def _initial_net(config: TrainConfig, seed: int) -> Net:
    """Draw a fresh net without touching the process's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs for good
        return Net(config.dropout)


def _smoothed_loss(log_probs: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy against labels mixed with the uniform distribution (arXiv 1512.00567, 7)."""
    loss = F.nll_loss(log_probs, labels)
    return loss if not smoothing else (1 - smoothing) * loss - smoothing * log_probs.mean()


def _first_not_finite(losses: Tensor) -> int | None:
    """Return the 1-based step of the first loss that is NaN or infinite."""
    bad = (~losses.isfinite()).nonzero()
    return int(bad[0].item()) + 1 if len(bad) else None


def _seeds(seed: int, epoch: int) -> tuple[int, int]:
    """Derive two independent seeds, 63 bits each, from a run's seed and an epoch."""
    first, second = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint64) >> 1
    return int(first), int(second)


def _pack(value: Any) -> bytes:
    buffer = BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Any:
    try:
        return torch.load(BytesIO(packed), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise ConfigError("the saved state is damaged") from error
