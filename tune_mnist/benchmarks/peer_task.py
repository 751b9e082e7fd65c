"""What every system of `bench peers` is given to do, and how each trial says how far it is.

A peer is a module run as `python -m tune_mnist.benchmarks.peer_<name>` with the path of a task. It
uses the other library as that library's own documentation does, on the textbook recipe.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.data import HOLDOUT_SHARE, choose_stratified, load_mnist
from tune_mnist.runs.parameter import Distribution
from tune_mnist.runs.space import SearchSpace, load_space

CHOSEN = ("train", "val")  # files <name>.npy: which of the 60,000 images
REDUCTION_FACTOR = 3  # of successive halving, from epoch 1 on; in every system


@dataclass(frozen=True)
class Task:
    """A search to run."""

    space: str
    trials: int
    images: int
    epochs: int
    at_once: int
    seed: int
    tests: bool  # on the test images after every epoch too, and not only on the validation images
    data_dir: str
    folder: str  # for progress, and whatever the system writes

    @classmethod
    def read(cls, file: str) -> "Task":
        """Read a task that was written."""
        return cls(**json.loads(Path(file).read_text("utf-8")))

    def write(self) -> str:
        """Write the task into its folder and return the file's path."""
        file = Path(self.folder) / "task.json"
        file.write_text(json.dumps(asdict(self)), "utf-8")
        return str(file)

    def searched(self) -> tuple[dict[str, Distribution], dict[str, Any]]:
        """Return the searched parameters' distributions and the constants.

        Raises:
            ConfigError: the space has conditions, which not all systems can express.
        """
        space: SearchSpace = load_space(self.space)
        if conditional := [name for name, each in space.parameters.items() if each.when]:
            raise ConfigError(
                f"--space: {self.space} has conditions (on {', '.join(conditional)}), which not "
                "all systems can express; sgd and quick have none"
            )
        distributions = {name: each.distribution for name, each in space.parameters.items()}
        return distributions, dict(space.constants)


def write_chosen(task: Task) -> None:
    """Write down which images are trained on and validated with: those that `split` chooses."""
    labels = load_mnist(Path(task.data_dir)).train_labels
    val = choose_stratified(labels, len(labels) // HOLDOUT_SHARE)
    rest = np.setdiff1d(np.arange(len(labels)), val)
    train = rest[choose_stratified(labels[rest], task.images)]
    for name, indices in zip(CHOSEN, (train, val), strict=True):
        np.save(Path(task.folder) / f"{name}.npy", indices)


@dataclass(frozen=True)
class Progress:
    """A trial's finished epoch."""

    time: float  # seconds since 1970
    trial: str
    val_accuracy: float


def note_epoch(folder: str, trial: object, val_accuracy: float) -> None:
    """Write down, from any process, that a trial has finished an epoch."""
    line = json.dumps([time.time(), str(trial), val_accuracy]) + "\n"
    file = os.open(Path(folder) / "progress", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def read_progress(folder: str) -> list[Progress]:
    """Return all finished epochs, in the order of their ends."""
    path = Path(folder) / "progress"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return sorted((Progress(*json.loads(line)) for line in lines), key=lambda each: each.time)


def suggest(distributions: Mapping[str, Distribution], trial: Any) -> Iterator[tuple[str, Any]]:
    """Draw all parameters as Optuna's documentation does."""
    for name, distribution in distributions.items():
        match distribution:
            case CategoricalDistribution(choices=choices):
                yield name, trial.suggest_categorical(name, choices)
            case IntDistribution(low=low, high=high, log=log):
                yield name, trial.suggest_int(name, low, high, log=log)
            case FloatDistribution(low=low, high=high, log=log):
                yield name, trial.suggest_float(name, low, high, log=log)
