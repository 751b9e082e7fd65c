"""What a worker does: train one assignment and report every epoch with its state."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray import tune

from tune_mnist.mnist.config import Precision
from tune_mnist.mnist.data import Split
from tune_mnist.mnist.metrics import EpochMetrics, Metric
from tune_mnist.runs.history import Assignment
from tune_mnist.runs.ranking import score
from tune_mnist.tuning.ray_patches import WORKER_ENVIRONMENT


@dataclass(frozen=True)
class TrialEpoch:
    """What a trial reports after an epoch."""

    metrics: EpochMetrics
    state: bytes  # all that the next epoch needs
    model: Callable[[], bytes]  # makes the content of best.pt, in case this epoch is the best


EpochSource = Callable[[Assignment, Split], Iterator[TrialEpoch]]


def run_trial(config: Mapping[str, Any], epochs_of: EpochSource, split: Split) -> None:
    """Train the assignment in `config`; Tune calls this in a worker, once a trial."""
    os.environ.update(WORKER_ENVIRONMENT)
    assignment: Assignment = config["assignment"]
    best = (-math.inf, -math.inf)
    for epoch in epochs_of(assignment, split):
        model = None
        if not epoch.metrics.diverged:
            value = score(epoch.metrics, assignment.metric)
            if value > best:  # only a trial's own best can be the search's best
                best, model = value, epoch.model()
        tune.report(report_of(epoch, model, assignment.metric))
    raise RuntimeError("the training ended without being told to stop")


def report_of(epoch: TrialEpoch, model: bytes | None, metric: Metric) -> dict[str, Any]:
    """Return what Tune is told of an epoch; it requires the metric at the top level."""
    value = epoch.metrics.accuracy(metric)
    return {"metrics": epoch.metrics, "state": epoch.state, "model": model, metric: value}


def threads_given() -> int:
    """Return the threads that Ray, or the user instead, lets a worker have."""
    threads, _, _ = os.environ.get("OMP_NUM_THREADS", "").partition(",")  # for nested ones
    return max(1, int(threads)) if threads.isdecimal() else 1


def train_assignment(
    assignment: Assignment, split: Split, *, precision: Precision = "float32"
) -> Iterator[TrialEpoch]:
    """Train for real, on the CPUs and GPUs that Ray gave this worker."""
    import torch  # the driver imports this module too, and does not need torch

    from tune_mnist.mnist.checkpoint import pack_model
    from tune_mnist.mnist.training import train

    torch.set_num_threads(threads_given())
    results = train(
        assignment.config,
        split,
        epochs=assignment.epochs,
        seed=assignment.seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
        precision=precision,
        state=assignment.state,
    )
    for result in results:
        facts = {"trial": assignment.number, "seed": assignment.seed, **result.metrics.as_dict()}
        model = partial(pack_model, assignment.config, result.weights, **facts)
        yield TrialEpoch(result.metrics, result.state, model)
