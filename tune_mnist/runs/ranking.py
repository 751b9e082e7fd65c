"""Which epoch of a trial counts as its best and its last, and what epochs are compared by."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tune_mnist.runs.history import History, Metric, Row, TrialRecord


@dataclass(frozen=True)
class RankedTrial:
    """A trial with the two epochs that it is judged by."""

    record: TrialRecord
    best: Row | None  # None: it has no epoch to be judged by
    last: Row | None

    @classmethod
    def of(cls, record: TrialRecord, metric: Metric) -> "RankedTrial":
        """Find a trial's best and last epoch."""
        rows = [row for row in record.rows if counts(row, metric)]
        best = max(rows, key=lambda row: score(row, metric), default=None)  # first of equals
        return cls(record, best, rows[-1] if rows else None)

    @property
    def is_baseline(self) -> bool:
        """Whether it is the trial that all others are compared with."""
        return self.record.origin == "baseline"


def standings(history: History, metric: Metric) -> list[RankedTrial]:
    """Return all trials with the epochs that they are judged by, in the order of their start."""
    return [RankedTrial.of(record, metric) for record in history.trials.values()]


def rank_by_best(trials: Iterable[RankedTrial], metric: Metric) -> list[RankedTrial]:
    """Return the trials that have an epoch to be judged by, the one with the best epoch first."""
    ranked = [(_order(each.best, each, metric), each) for each in trials if each.best]
    return [each for _, each in sorted(ranked, key=lambda pair: pair[0])]


def rank_by_last(trials: Iterable[RankedTrial], metric: Metric) -> list[RankedTrial]:
    """Return the trials that have an epoch to be judged by, the best at its last epoch first."""
    ranked = [(_order(each.last, each, metric), each) for each in trials if each.last]
    return [each for _, each in sorted(ranked, key=lambda pair: pair[0])]


def _order(row: Row, trial: RankedTrial, metric: Metric) -> tuple[float, ...]:
    accuracy, negative_loss = score(row, metric)
    return -accuracy, -negative_loss, trial.record.epochs, trial.record.number


def counts(row: Row, metric: Metric) -> bool:
    """Say whether an epoch ranks; one that diverged never does."""
    return row["diverged_step"] is None and math.isfinite(number(row, metric))


def score(row: Row, metric: Metric) -> tuple[float, float]:
    """Return what epochs are compared by, the better the higher.

    It is the metric and, of equals, the lower loss on the same images: on 5,000 images equal
    accuracies are common.
    """
    loss = number(row, loss_of(metric))
    return number(row, metric), -loss if math.isfinite(loss) else -math.inf


def gain(row: Row | None, baseline: Row | None) -> float:
    """Return how much higher the test accuracy is than in an epoch of the baseline, or NaN."""
    if row is None or baseline is None:
        return math.nan
    return number(row, "test_accuracy") - number(baseline, "test_accuracy")


def loss_of(metric: Metric) -> str:
    """Return the name of the loss on the images that the metric is measured on."""
    return metric.replace("accuracy", "loss")


def number(row: Row, name: str) -> float:
    """Return a value of an epoch, NaN where it was not measured."""
    value = row[name]
    return math.nan if value is None else value
