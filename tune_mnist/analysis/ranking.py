"""Which epoch of a trial counts as its best and its last, and what epochs are compared by."""

import math
from dataclasses import dataclass

from tune_mnist.analysis.history import Metric, Row, TrialRecord


@dataclass(frozen=True)
class Standing:
    """A trial with the two epochs that it is judged by."""

    record: TrialRecord
    best: Row | None  # None: it has no epoch to be judged by
    last: Row | None

    @classmethod
    def of(cls, record: TrialRecord, metric: Metric) -> "Standing":
        """Find a trial's best and last epoch."""
        rows = [row for row in record.rows if counts(row, metric)]
        best = max(rows, key=lambda row: merit(row, metric), default=None)  # first of equals
        return cls(record, best, rows[-1] if rows else None)


def counts(row: Row, metric: Metric) -> bool:
    """Say whether an epoch ranks; one that diverged never does."""
    return row["diverged_step"] is None and math.isfinite(number(row, metric))


def merit(row: Row, metric: Metric) -> tuple[float, float]:
    """Return what epochs are compared by, the better the higher.

    It is the metric and, of equals, the lower loss on the same images: on 5,000 images equal
    accuracies are common.
    """
    loss = number(row, loss_of(metric))
    return number(row, metric), -loss if math.isfinite(loss) else -math.inf


def loss_of(metric: Metric) -> str:
    """Return the name of the loss on the images that the metric is measured on."""
    return metric.replace("accuracy", "loss")


def number(row: Row, name: str) -> float:
    """Return a value of an epoch, NaN where it was not measured."""
    value = row[name]
    return math.nan if value is None else value
