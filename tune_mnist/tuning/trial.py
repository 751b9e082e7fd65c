"""What a worker does: train one assignment and report every epoch with its state."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ray import tune

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Split
from tune_mnist.tuning.experiment import Assignment

# A fuller EpochResult is what `training.train` yields; scripted trials yield the same names.
EpochSource = Callable[[Assignment, Split], Iterator[Any]]


def run_trial(config: Mapping[str, Any], epochs_of: EpochSource, split: Split) -> None:
    """Train the assignment in `config`; Tune calls this in a worker, one call a trial.

    Raises:
        Whatever training raises; Tune hands it to the driver.
    """
    assignment: Assignment = config["assignment"]
    best = -1.0
    for result in epochs_of(assignment, split):
        metrics = result.metrics()
        value = metrics[assignment.metric]
        model = result.model if value > best else None  # spare the driver what cannot be its best
        best = max(best, value)
        tune.report({**metrics, "state": result.state, "model": model})


def train_assignment(assignment: Assignment, split: Split) -> Iterator[Any]:
    """Train for real, on the worker's share of the machine."""
    import torch  # the driver, which imports this module as well, does without it

    from tune_mnist.mnist.training import train

    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    return train(
        TrainConfig.from_mapping(assignment.config),
        split,
        epochs=assignment.epochs,
        seed=assignment.seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
        state=assignment.state,
    )
