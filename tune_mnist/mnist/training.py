"""One training run: a generator that yields an EpochResult after every epoch.

The train command, the search's trials, the confirmation and the benchmarks all drive this loop. A
`Run` takes one `Step` after another, on a CPU or, through `cuda`, on a GPU.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tune_mnist.errors import StateError
from tune_mnist.mnist import checkpoint
from tune_mnist.mnist.config import Precision, TrainConfig, check_precision
from tune_mnist.mnist.cpu import backend, keep_freed_memory
from tune_mnist.mnist.cuda import Prepared, StepKey, Stopwatch, Workspace, fetch
from tune_mnist.mnist.data import Split
from tune_mnist.mnist.forward import TORCH, Score, tally, training_forward
from tune_mnist.mnist.images import SplitTensors
from tune_mnist.mnist.metrics import EpochMetrics
from tune_mnist.mnist.net import Net
from tune_mnist.mnist.step import Step, StepKind, Take, constants, learning_rates, step_table

DIVERGENCE_CHECK_EVERY = 32  # steps, on a CPU

StepListener = Callable[[int, Tensor], None]  # gets the batch's number (1-based) and its loss


@dataclass(frozen=True)
class EpochResult:
    """What one epoch came to, and what it takes to resume after it."""

    metrics: EpochMetrics
    state: bytes  # all that the next epoch needs: see `train`
    weights: bytes  # state_dict of the evaluated net: see `checkpoint.load_weights`


def train(
    config: TrainConfig,
    split: Split,
    *,
    epochs: int,
    seed: int,
    device: str = "cpu",
    precision: Precision = "float32",
    state: bytes | None = None,
    on_step: StepListener | None = None,
) -> Iterator[EpochResult]:
    """Train a fresh net, or resume from a state, and yield each epoch as it finishes.

    Every epoch seeds its own random numbers from (seed, epoch), so that a state needs none and a
    run that was broken off reports what the unbroken one would have, to the last digit on a CPU
    (for a number of threads). `epochs` is the run's full length, which also stretches the
    schedule. `state` is that of an earlier EpochResult of the same run, on whatever device; one
    that is damaged, or of another run or version, raises StateError.
    """
    check_precision(precision, device)
    run = Run(config, split, epochs=epochs, seed=seed, device=device, precision=precision)
    # What a state must agree in to be resumed from; not the length of the schedule.
    identity = {"config": config.as_dict(), "seed": seed, "images": len(split.train_labels)}
    done = 0
    if state is not None:
        saved = checkpoint.unpack(state)
        if not isinstance(saved, dict) or saved.get("run") != identity:
            raise StateError(
                "the saved state belongs to another configuration, seed or number of images"
            )
        done, run.state = saved["epoch"], saved
    while done < epochs:
        metrics, _ = run.train_epoch(done, on_step)
        done += 1
        yield EpochResult(
            metrics,
            state=checkpoint.pack({"run": identity, "epoch": done, **run.state}),
            weights=checkpoint.pack(checkpoint.evaluated_weights(run.state)),
        )
        if metrics.diverged:
            return


class Run:
    """One training run; between two epochs all of it is in `state`, on the CPU.

    The two kinds of device differ in three points. A CPU breaks a diverged epoch off early, and
    does not evaluate it; a GPU is not waited for before the epoch's end. A CPU uses the split's
    own images; a GPU's lie in its workspace, which other runs use between two epochs.
    """

    def __init__(
        self,
        config: TrainConfig,
        split: Split,
        *,
        epochs: int,
        seed: int,
        device: str = "cpu",
        precision: Precision = "float32",
        captured: bool = True,
    ) -> None:
        self.config, self.split, self.epochs, self.seed = config, split, epochs, seed
        self.device, self.precision, self.captured = device, precision, captured
        self.steps = math.ceil(len(split.train_labels) / config.batch_size)
        self.rates = learning_rates(config, epochs=epochs, steps_per_epoch=self.steps)
        net = draw_net(config, seed)
        self.state = checkpoint.initial_state(net, config)
        self._on_cpu = device == "cpu"
        self._backend = backend(net, torch.get_num_threads()) if self._on_cpu else TORCH
        keep_freed_memory()

    def train_epoch(
        self, done: int, on_step: StepListener | None = None
    ) -> tuple[EpochMetrics, Tensor]:
        """Train the epoch after `done`; return its metrics and its steps' losses, on the CPU."""
        order_seed, draw_seed = draw_seeds(self.seed, done + 1)
        taken = done * self.steps
        rates = self.rates[taken : taken + self.steps]
        order = draw_order(len(self.split.train_labels), order_seed).to(self.device)
        table = step_table(self.config, rates, taken).to(self.device)
        with self._prepared_step(done) as prepared:
            step = prepared.step
            step.generator.manual_seed(draw_seed)
            watch = Stopwatch(self.device)
            losses = self._take_steps(prepared.take, order, table, on_step)
            watch.lap()
            tallies = self._evaluate(step, losses)
            watch.lap()
            losses, val, test, *vectors = fetch([losses, *tallies, *step.vectors])
            self.state = checkpoint.state_of(step, vectors, self.config, taken + len(losses))
            prepared.state = self.state
        on_val = Score.of(len(self.split.val_labels), val)
        on_test = Score.of(len(self.split.test_labels), test)
        return self._metrics(done + 1, losses, on_val, on_test, watch.seconds()), losses

    @contextmanager
    def _prepared_step(self, done: int) -> Iterator[Prepared]:
        """Provide a step that holds this run's images and state, for the epoch after `done`."""
        kind = StepKind.of(self.config, done=done, epochs=self.epochs)
        if self._on_cpu:
            images, generator = SplitTensors.on(self.split, self.device), torch.Generator()
            forward = partial(training_forward, backend=self._backend)
            step = Step(kind, images, generator, forward, constants(self.config))
            checkpoint.put_state(self.state, step)
            yield Prepared(step, step.take)
        else:
            key = StepKey(kind, self.config.batch_size, self.precision, self.captured)
            with Workspace.on(self.device, self.split).lend(key, self.split, self.state) as lent:
                yield lent

    def _take_steps(
        self, take: Take, order: Tensor, table: Tensor, on_step: StepListener | None
    ) -> Tensor:
        """Take an epoch's steps; return their losses, fewer than steps if a CPU saw one lost."""
        losses = torch.zeros(self.steps, device=order.device)
        batches = torch.split(order, self.config.batch_size)
        for number, (batch, row) in enumerate(zip(batches, table, strict=True), start=1):
            losses[number - 1] = take(batch, row)
            if on_step is not None:
                on_step(number, losses[number - 1])
            checks = self._on_cpu and number % DIVERGENCE_CHECK_EVERY == 0
            if checks and first_not_finite(losses[:number]) is not None:
                return losses[:number]
        return losses

    def _evaluate(self, step: Step, losses: Tensor) -> list[Tensor]:
        if self._on_cpu and first_not_finite(losses) is not None:
            return [torch.full((2,), math.nan)] * 2
        net, data = step.average.net, step.data
        sets = (data.val_images, data.val_labels), (data.test_images, data.test_labels)
        return [tally(net, images, labels, self._backend) for images, labels in sets]

    def _metrics(
        self, epoch: int, losses: Tensor, val: Score, test: Score, laps: list[float]
    ) -> EpochMetrics:
        diverged = first_not_finite(losses)
        if diverged is None and (val.lost or test.lost):
            diverged = len(losses)  # the last step did it, or batch norm's statistics
        if diverged is not None:
            val = test = Score()
        images = len(self.split.train_labels)
        return EpochMetrics(
            epoch=epoch,
            train_loss=mean_per_image(losses, images, self.config.batch_size),
            val_loss=val.loss,
            val_accuracy=val.accuracy,
            test_loss=test.loss,
            test_accuracy=test.accuracy,
            test_correct=test.correct,
            seconds=laps[0],
            evaluation_seconds=laps[1],
            diverged_step=diverged,
        )


def draw_seeds(seed: int, epoch: int) -> tuple[int, int]:
    """Derive two independent seeds, 63 bits each, from a run's seed and an epoch."""
    first, second = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint64) >> 1
    return int(first), int(second)


def draw_order(images: int, seed: int) -> Tensor:
    """Draw the order of an epoch's images, int64 [images]; on the CPU, so the same everywhere."""
    return torch.randperm(images, generator=torch.Generator().manual_seed(seed))


def draw_net(config: TrainConfig, seed: int) -> Net:
    """Draw a run's fresh net without touching the process's random numbers."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed GPUs for good
        torch.default_generator.manual_seed(draw_seeds(seed, epoch=0)[0])
        net = Net(config.dropout)
    return net.to(memory_format=torch.channels_last)


def mean_per_image(losses: Tensor, images: int, batch_size: int) -> float:
    """Weigh the losses of an epoch's batches, or the first of them, by the batches' sizes."""
    sizes = torch.full_like(losses, batch_size)
    if len(losses) * batch_size > images:
        sizes[-1] = images % batch_size  # the last batch is smaller
    return ((losses * sizes).sum() / sizes.sum()).item()


def first_not_finite(losses: Tensor) -> int | None:
    """Return the 1-based step of the first loss that is NaN or infinite."""
    bad = (~losses.isfinite()).nonzero()
    return int(bad[0].item()) + 1 if len(bad) else None
