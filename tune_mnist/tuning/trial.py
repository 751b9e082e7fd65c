"""What a worker does: train one assignment and report every epoch with its state."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray import tune

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Split
from tune_mnist.tuning.experiment import Assignment


@dataclass(frozen=True)
class TrialEpoch:
    """What a trial reports after an epoch."""

    metrics: Mapping[str, Any]  # by the names of history.METRICS
    state: bytes  # all it takes to go on with the next epoch
    model: Callable[[], bytes]  # makes the content of best.pt, in case this epoch is the best


EpochSource = Callable[[Assignment, Split], Iterator[TrialEpoch]]


def run_trial(config: Mapping[str, Any], epochs_of: EpochSource, split: Split) -> None:
    """Train the assignment in `config`; Tune calls this in a worker, once a trial.

    Raises:
        Whatever training raises; Tune hands it to the driver.
    """
    assignment: Assignment = config["assignment"]
    best = -math.inf
    for epoch in epochs_of(assignment, split):
        value = epoch.metrics[assignment.metric]
        # Only a trial's own best can be the search's best: spare the driver the others.
        model = epoch.model() if value > best else None
        best = max(best, value)
        tune.report({**epoch.metrics, "state": epoch.state, "model": model})


def train_assignment(assignment: Assignment, split: Split) -> Iterator[TrialEpoch]:
    """Train for real, on the worker's share of the machine."""
    import torch  # the driver, which imports this module as well, does without it

    from tune_mnist.mnist.fused import keep_freed_memory
    from tune_mnist.mnist.model_file import pack_model
    from tune_mnist.mnist.training import train

    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    keep_freed_memory()
    config = TrainConfig.from_mapping(assignment.config)
    results = train(
        config,
        split,
        epochs=assignment.epochs,
        seed=assignment.seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
        state=assignment.state,
    )
    for result in results:
        metrics = result.metrics()
        facts = {"trial": assignment.number, "seed": assignment.seed, **metrics}
        yield TrialEpoch(
            metrics, result.state, partial(pack_model, config, result.weights, **facts)
        )
