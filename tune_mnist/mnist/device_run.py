"""A training run on a GPU: nothing waits for the device before an epoch is evaluated."""

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tune_mnist.mnist.config import Precision, TrainConfig, products_in
from tune_mnist.mnist.data import Split
from tune_mnist.mnist.device_step import DeviceStep, StepKind, step_columns
from tune_mnist.mnist.epoch import Epoch, StepListener, draw_order, draw_seeds
from tune_mnist.mnist.evaluation import Score, tally
from tune_mnist.mnist.images import augments
from tune_mnist.mnist.optim import learning_rates
from tune_mnist.mnist.run_state import initial_state, put_state, state_of, vectors_of
from tune_mnist.mnist.workspace import Workspace


class DeviceRun:
    """One training run, which is on the device within an epoch and in its state between two.

    The device's workspace belongs to the process and may serve other runs in between.
    """

    def __init__(
        self,
        config: TrainConfig,
        split: Split,
        *,
        epochs: int,
        seed: int,
        device: str,
        precision: Precision = "float32",
        captured: bool = True,
    ) -> None:
        self.config, self.split, self.seed, self.device = config, split, seed, device
        self.epochs, self.precision, self.captured = epochs, precision, captured
        self.steps = math.ceil(len(split.train_labels) / config.batch_size)
        self.rates = learning_rates(config, epochs=epochs, steps_per_epoch=self.steps)
        self.load_state_dict(initial_state(config, seed))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from an Epoch's state."""
        self._state = state
        self._mark = object()  # on a workspace, with a kind: that state lies in its step

    def train_epoch(self, done: int, on_step: StepListener | None) -> Epoch:
        """Train one more epoch than are done, and evaluate, also if it diverged."""
        workspace = Workspace.on(self.device, self.split)
        with workspace.lock, products_in("float32"):
            kind = self._kind(done)
            step = workspace.step(kind)
            if workspace.mark != (self._mark, kind):
                workspace.data.fill(self.split)
                put_state(self._state, step)
            workspace.mark = None  # an epoch that is broken off leaves nothing to go on from
            epoch = self._train(workspace, step, done, on_step)
            self._state, workspace.mark = epoch.state, (self._mark, kind)
        return epoch

    def _kind(self, done: int) -> StepKind:
        """Return the kind of step that the epoch after so many takes."""
        distorts = augments(self.config, done=done, epochs=self.epochs)
        return StepKind(
            optimizer=self.config.optimizer,
            batch_size=self.config.batch_size,
            distorts=distorts,
            bends=distorts and self.config.elastic > 0,
            precision=self.precision,
            captured=self.captured,
        )

    def _train(
        self, workspace: Workspace, step: DeviceStep, done: int, on_step: StepListener | None
    ) -> Epoch:
        order_seed, draw_seed = draw_seeds(self.seed, done + 1)
        taken = done * self.steps
        rates = self.rates[taken : taken + self.steps]
        step.begin_epoch(
            draw_order(len(self.split.train_labels), order_seed),
            step_columns(self.config, rates, taken),
            draw_seed,
        )
        watch = Stopwatch(self.device)
        with products_in(self.precision):
            for number in range(self.steps):
                step.take(number)
                if on_step is not None:
                    on_step(number + 1, step.losses[number].clone())
        watch.lap()
        net, data = step.average.net, workspace.data
        val = tally(net, data.val_images, data.val_labels)
        test = tally(net, data.test_images, data.test_labels)
        watch.lap()
        losses, val, test, *vectors = fetch([step.losses, val, test, *vectors_of(step)])
        seconds, evaluation_seconds = watch.seconds()
        return Epoch(
            losses,
            Score.of(len(data.val_labels), val),
            Score.of(len(data.test_labels), test),
            seconds,
            evaluation_seconds,
            state_of(step, vectors, self.config, taken + self.steps),
        )


def fetch(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Copy vectors to the CPU in one go, having waited for all that the device was given."""
    copied = torch.cat(list(vectors)).to("cpu", non_blocking=True)
    if vectors[0].device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    return [part.clone() for part in torch.split(copied, [len(vector) for vector in vectors])]


class Stopwatch:
    """Takes times on a device, which does what it is told later than it is told."""

    def __init__(self, device: str) -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._marks: list[Any] = []
        self.lap()

    def lap(self) -> None:
        """End a lap, and begin another."""
        if self._on_gpu:
            mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
            self._marks.append(mark)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return what each lap took; on a GPU only after waiting for it."""
        pairs = pairwise(self._marks)
        if self._on_gpu:
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        return [end - begin for begin, end in pairs]
