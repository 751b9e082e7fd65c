"""What a worker reports of the epochs that it trains."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from ray import tune
from support.epochs import epoch_metrics

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Split
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.history import Assignment
from tune_mnist.tuning.worker import TrialEpoch, run_trial


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a trial that runs in this process reports to Tune."""
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", reports.append)
    return reports


def epochs_of(*values: tuple[float, float], diverging: bool = False) -> Any:
    def epochs(assignment: Assignment, split: Split) -> Iterator[TrialEpoch]:
        for epoch, (accuracy, loss) in enumerate(values, start=1):
            step = 3 if diverging and epoch == len(values) else None
            losses = {"val_loss": loss, "test_loss": 1 - loss}
            metrics = epoch_metrics(epoch, accuracy, 1 - accuracy, **losses, diverged_step=step)
            yield TrialEpoch(metrics, b"state", partial(bytes, [epoch]))

    return epochs


def run(metric: Metric, epochs: Any) -> None:
    """Run a trial that nobody tells to stop."""
    config = {"assignment": Assignment(0, TrainConfig(), 0, 20, metric, None)}
    nothing: Any = None
    with pytest.raises(RuntimeError, match="without being told to stop"):
        run_trial(config, epochs, nothing)


def test_only_a_trials_own_best_epochs_carry_a_model(reports: list[dict[str, Any]]) -> None:
    run("val_accuracy", epochs_of((0.5, 0.2), (0.4, 0.1), (0.5, 0.1), (0.5, 0.1), (0.6, 0.9)))
    assert [report["model"] for report in reports] == [b"\1", None, b"\3", None, b"\5"]


def test_the_best_is_that_of_the_chosen_metric(reports: list[dict[str, Any]]) -> None:
    run("test_accuracy", epochs_of((0.5, 0.2), (0.6, 0.1), (0.4, 0.3)))
    assert [report["model"] for report in reports] == [b"\1", None, b"\3"]


def test_an_epoch_that_diverged_carries_no_model(reports: list[dict[str, Any]]) -> None:
    run("val_accuracy", epochs_of((0.5, 0.2), (math.nan, math.nan), diverging=True))
    assert [report["model"] for report in reports] == [b"\1", None]
    assert [report["state"] for report in reports] == [b"state", b"state"]
