"""Which epoch of a trial counts as its best and its last, and what epochs are compared by."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tune_mnist.mnist.metrics import EpochMetrics, Metric
from tune_mnist.runs.history import EpochRow, History, TrialRecord


@dataclass(frozen=True)
class RankedTrial:
    """A trial with the two epochs that it is judged by."""

    record: TrialRecord
    best: EpochRow | None  # None: it has no epoch to be judged by
    last: EpochRow | None

    @classmethod
    def of(cls, record: TrialRecord, metric: Metric) -> "RankedTrial":
        """Find a trial's best and last epoch."""
        rows = [row for row in record.rows if row.counts(metric)]
        best = max(rows, key=lambda row: score(row, metric), default=None)  # first of equals
        return cls(record, best, rows[-1] if rows else None)

    def accuracy(self, metric: Metric) -> float:
        """Return an accuracy at the best epoch, NaN where there is none."""
        return self.best.accuracy(metric) if self.best else math.nan

    @property
    def is_baseline(self) -> bool:
        """Whether it is the trial that all others are compared with."""
        return self.record.origin == "baseline"


class BestSoFar:
    """The best epoch among those that it was shown, and its trial."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self.found: tuple[TrialRecord, EpochRow] | None = None

    def take(self, record: TrialRecord, row: EpochRow) -> bool:
        """Return True if this epoch is better than all before it, and remember it."""
        metric = self._metric
        better = row.counts(metric) and (
            self.found is None or score(row, metric) > score(self.found[1], metric)
        )
        if better:
            self.found = record, row
        return better


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


def _order(row: EpochRow, trial: RankedTrial, metric: Metric) -> tuple[float, ...]:
    accuracy, negative_loss = score(row, metric)
    return -accuracy, -negative_loss, trial.record.epochs, trial.record.number


def score(row: EpochMetrics, metric: Metric) -> tuple[float, float]:
    """Return what epochs are compared by, the better the higher.

    It is the metric and, of equals, the lower loss on the same images: on 5,000 images equal
    accuracies are common.
    """
    loss = row.loss(metric)
    return row.accuracy(metric), -loss if math.isfinite(loss) else -math.inf


def gain(row: EpochRow | None, baseline: EpochRow | None) -> float:
    """Return how much higher the test accuracy is than in an epoch of the baseline, or NaN."""
    if row is None or baseline is None:
        return math.nan
    return row.test_accuracy - baseline.test_accuracy
