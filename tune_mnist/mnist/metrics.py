"""The record of one epoch of one training run, from the worker to the CSV."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from tune_mnist.mnist.config import Limits

Metric = Literal["val_accuracy", "test_accuracy"]
Loss = Annotated[float, Limits(or_nan=True)]
Fraction = Annotated[float, Limits(">= 0", "<= 1", or_nan=True)]
Time = Annotated[float, Limits(">= 0", "<= 1e9", or_nan=True)]


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """Losses are means per image, accuracies fractions in [0, 1], times seconds.

    Without a holdout the `val_` values are NaN. An epoch that diverged did so at `diverged_step`
    (1-based within the epoch), was not evaluated, and is the last.
    """

    epoch: Annotated[int, Limits(">= 1", "<= 1e6")]  # 1-based, finished
    train_loss: Loss  # as optimized, during the epoch
    val_loss: Loss
    val_accuracy: Fraction
    test_loss: Loss
    test_accuracy: Fraction
    test_correct: Annotated[int, Limits(">= 0", "<= 1e9")]  # of 10,000
    seconds: Time  # training time, without the evaluation
    evaluation_seconds: Time
    diverged_step: Annotated[int, Limits(">= 1", "<= 1e9")] | None = None

    @property
    def diverged(self) -> bool:
        return self.diverged_step is not None

    def accuracy(self, metric: Metric) -> float:
        return self.val_accuracy if metric == "val_accuracy" else self.test_accuracy

    def loss(self, metric: Metric) -> float:
        """Return the loss on the images of that accuracy."""
        return self.val_loss if metric == "val_accuracy" else self.test_loss

    def counts(self, metric: Metric) -> bool:
        """Return True if a trial can be judged by this epoch."""
        return not self.diverged and math.isfinite(self.accuracy(metric))

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in METRICS}


METRICS = tuple(entry.name for entry in fields(EpochMetrics))
