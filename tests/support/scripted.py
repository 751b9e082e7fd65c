"""Trials with known learning curves that take milliseconds, for everything but the training."""

import io
import math
import os
import resource
import signal
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from support.epochs import epoch_metrics
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Split
from tune_mnist.runs.history import Assignment
from tune_mnist.tuning.worker import TrialEpoch, train_assignment

Faults = Mapping[int, tuple[int, ...]]  # trial -> the epochs (1-based) in which it happens


@dataclass(frozen=True)
class Script:
    """How trials go, beside their curve."""

    seconds: float = 0.02  # an epoch
    state_size: int = 0  # bytes that a state has at least
    notes: Path | None = None  # a folder in which workers note what they have done
    killed: Faults = field(default_factory=dict)  # the worker, with SIGKILL, every time
    killed_once: Faults = field(default_factory=dict)  # the same, but the first time only
    killed_after: tuple[int, ...] = ()  # trials whose worker dies as it lets go of them
    raising: Faults = field(default_factory=dict)
    diverging: Faults = field(default_factory=dict)
    held: Faults = field(default_factory=dict)  # until `release`, before the epoch
    hanging: Faults = field(default_factory=dict)
    allocating: Faults = field(default_factory=dict)  # until there is no memory left
    memory: int = 0  # bytes beyond what it has, the most that an allocating worker gets; 0: all

    def __call__(self, assignment: Assignment, split: Split) -> Iterator[TrialEpoch]:
        try:
            done = int(assignment.state.split()[0]) if assignment.state else 0
            for epoch in range(done + 1, assignment.epochs + 1):
                time.sleep(self.seconds)
                self._suffer(assignment.number, epoch)
                yield self._epoch(assignment, epoch)
        except GeneratorExit:
            if assignment.number in self.killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
            raise

    def _epoch(self, assignment: Assignment, epoch: int) -> TrialEpoch:
        self._note("epochs", f"{assignment.number} {epoch}")
        accuracy = curve(assignment.config, epoch)
        if epoch in self.diverging.get(assignment.number, ()):
            accuracy = math.nan
        facts = {"train_loss": 1 - accuracy, "seconds": self.seconds, "evaluation_seconds": 0.0}
        return TrialEpoch(
            metrics=epoch_metrics(epoch, accuracy, accuracy - 0.001, **facts),
            state=f"{epoch} ".encode().ljust(self.state_size, b"."),
            model=partial(model_of, assignment.number, epoch),
        )

    def _suffer(self, number: int, epoch: int) -> None:
        once = epoch in self.killed_once.get(number, ()) and self._is_first(f"{number}-{epoch}")
        if once or epoch in self.killed.get(number, ()):
            os.kill(os.getpid(), signal.SIGKILL)
        if epoch in self.raising.get(number, ()):
            raise RuntimeError(f"no luck\nin epoch {epoch}")
        if epoch in self.held.get(number, ()):
            self._wait_for_release(f"{number}-{epoch}")
        if epoch in self.hanging.get(number, ()):
            time.sleep(3600)
        if epoch in self.allocating.get(number, ()):
            _allocate(self.memory)

    def _is_first(self, name: str) -> bool:
        try:
            self._path(name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _wait_for_release(self, name: str) -> None:
        self._path(f"held-{name}").touch()
        while not self._path(f"released-{name}").exists():
            time.sleep(0.005)

    def is_held(self, number: int, epoch: int) -> bool:
        """Return True once a worker waits before this epoch."""
        return self._path(f"held-{number}-{epoch}").exists()

    def release(self, *trials: int) -> None:
        """Let these trials continue, or all that are held; they are not held there again."""
        for number in trials or self.held:
            for epoch in self.held[number]:
                self._path(f"released-{number}-{epoch}").touch()

    def _path(self, name: str) -> Path:
        if self.notes is None:
            raise ValueError("this script needs a folder for its notes")
        return self.notes / name

    def _note(self, name: str, line: str) -> None:
        if self.notes is not None:
            with (self.notes / name).open("a") as file:
                file.write(f"{line}\n")


def curve(config: TrainConfig, epoch: int) -> float:
    """Accuracy after an epoch: better near lr 0.03 and momentum 0.9, rising with the epochs."""
    distance = abs(math.log10(config.lr / 0.03)) + abs(config.momentum - 0.9)
    return float(0.99 - 0.05 * distance - 0.1 / (epoch + 1))


def train_little(assignment: Assignment, split: Split) -> Iterator[TrialEpoch]:
    """Train for real, on few enough images that an epoch takes a fraction of a second."""
    few = {name: each[: 640 if "train" in name else 200] for name, each in vars(split).items()}
    return train_assignment(assignment, Split(**few))


def model_of(number: int, epoch: int) -> bytes:
    return packed(f"{number} {epoch}")


def packed(text: str) -> bytes:
    """Return what stands for a model: a zip file, as torch's are."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(zipfile.ZipInfo("model"), text)
    return content.getvalue()


def unpacked(path: Path) -> str:
    return zipfile.ZipFile(path).read("model").decode()


def _allocate(limit: int) -> None:
    if limit:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        now = pages * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + limit, now + limit))
    hoard = []
    while True:
        hoard.append(b"x" * (64 << 20))
        time.sleep(0.01)
