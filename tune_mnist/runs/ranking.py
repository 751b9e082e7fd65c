"""Scores: which epoch of a trial is its best, and which trial is better than another."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter

from tune_mnist.mnist.metrics import EpochMetrics, Metric
from tune_mnist.runs.history import EpochRow, History, TrialRecord


def score(row: EpochMetrics, metric: Metric) -> tuple[float, float]:
    """Return the score by which epochs are compared; higher is better.

    Equal accuracies are common on 5,000 images: of these, the lower loss on them is better.
    """
    loss = row.loss(metric)
    return row.accuracy(metric), -loss if math.isfinite(loss) else -math.inf


class BestSoFar:
    """The epoch with the highest score among those taken, and its trial."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self.found: tuple[TrialRecord, EpochRow] | None = None

    def take(self, record: TrialRecord, row: EpochRow) -> bool:
        """Remember this epoch and return True if it is better than all before it."""
        if not row.counts(self._metric):
            return False
        if self.found and score(row, self._metric) <= score(self.found[1], self._metric):
            return False
        self.found = record, row
        return True


@dataclass(frozen=True)
class RankedTrial:
    """A trial with the two epochs that it is ranked by."""

    record: TrialRecord
    best: EpochRow | None  # None: no epoch counts
    last: EpochRow | None

    @classmethod
    def of(cls, record: TrialRecord, metric: Metric) -> "RankedTrial":
        rows = record.rows_that_count(metric)
        best = max(rows, key=lambda row: score(row, metric), default=None)  # the first of equals
        return cls(record, best, rows[-1] if rows else None)

    def accuracy(self, metric: Metric) -> float:
        """Return an accuracy at the best epoch, NaN if there is none."""
        return self.best.accuracy(metric) if self.best else math.nan

    @property
    def is_baseline(self) -> bool:
        return self.record.origin == "baseline"


def ranked_trials(history: History, metric: Metric) -> list[RankedTrial]:
    """Return all trials with the epochs that they are ranked by, in order of start."""
    return [RankedTrial.of(record, metric) for record in history.trials.values()]


def baseline_of(trials: Iterable[RankedTrial]) -> RankedTrial | None:
    """Return the trial that all others are compared with."""
    return next((trial for trial in trials if trial.is_baseline), None)


def rank_by_best(trials: Iterable[RankedTrial], metric: Metric) -> list[RankedTrial]:
    """Return the trials that have a best epoch, the highest score first."""
    return _rank([(trial.best, trial) for trial in trials], metric)


def rank_by_last(trials: Iterable[RankedTrial], metric: Metric) -> list[RankedTrial]:
    """Return the trials that have a last epoch, the highest score there first."""
    return _rank([(trial.last, trial) for trial in trials], metric)


def _rank(
    trials: Iterable[tuple[EpochRow | None, RankedTrial]], metric: Metric
) -> list[RankedTrial]:
    """Sort by score; of equals, the trial that used fewer epochs, then the earlier one."""
    scored = [(score(row, metric), trial) for row, trial in trials if row is not None]
    scored.sort(key=lambda pair: (pair[1].record.epochs, pair[1].record.number))
    scored.sort(key=itemgetter(0), reverse=True)  # stable: equals keep their order
    return [trial for _, trial in scored]


def gain(row: EpochRow | None, baseline: EpochRow | None) -> float:
    """Return the test accuracy minus that of the baseline's epoch; NaN if either is missing."""
    if row is None or baseline is None:
        return math.nan
    return row.test_accuracy - baseline.test_accuracy
