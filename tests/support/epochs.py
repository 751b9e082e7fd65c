"""Epochs as training would report them, made up."""

import math
from typing import Any

from tune_mnist.mnist.metrics import EpochMetrics
from tune_mnist.runs.history import EpochRow


def epoch_metrics(epoch: int, val: float, test: float | None = None, **other: Any) -> EpochMetrics:
    """An epoch with these accuracies; one of NaN has diverged at step 7."""
    test = val if test is None else test
    finite = math.isfinite(test)
    values: dict[str, Any] = {
        "train_loss": 0.5 if finite else math.nan,
        "val_loss": 1 - val,
        "val_accuracy": val,
        "test_loss": 1 - test,
        "test_accuracy": test,
        "test_correct": round(test * 10_000) if finite else 0,
        "seconds": 2.0,
        "evaluation_seconds": 0.5,
        "diverged_step": None if finite else 7,
    }
    return EpochMetrics(epoch=epoch, **(values | other))


def epoch_row(
    trial: int, epoch: int, val: float, test: float | None = None, **other: Any
) -> EpochRow:
    """Return such an epoch as the history of a search holds it."""
    values = {"elapsed": 0.25, **epoch_metrics(epoch, val, test).as_dict(), **other}
    return EpochRow(trial=trial, **values)
