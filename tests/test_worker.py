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
from tune_mnist.tuning.worker import TrialEpoch, run_trial, threads_given


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", reports.append)
    return reports


def epochs_of(*values: tuple[float, float]) -> Any:
    def epochs(assignment: Assignment, split: Split) -> Iterator[TrialEpoch]:
        for epoch, (accuracy, loss) in enumerate(values, start=1):
            losses = {"val_loss": loss, "test_loss": 1 - loss}
            metrics = epoch_metrics(epoch, accuracy, 1 - accuracy, **losses)
            yield TrialEpoch(metrics, b"state", partial(bytes, [epoch]))

    return epochs


def run(metric: Metric, epochs: Any) -> None:
    config = {"assignment": Assignment(0, TrainConfig(), 0, 20, metric, None)}
    nothing: Any = None
    with pytest.raises(RuntimeError, match="without being told to stop"):
        run_trial(config, epochs, nothing)


@pytest.mark.parametrize(
    ("metric", "values", "models"),
    [
        (
            "val_accuracy",
            [(0.5, 0.2), (0.4, 0.1), (0.5, 0.1), (0.5, 0.1), (0.6, 0.9)],
            [b"\1", None, b"\3", None, b"\5"],
        ),
        ("test_accuracy", [(0.5, 0.2), (0.6, 0.1), (0.4, 0.3)], [b"\1", None, b"\3"]),
        ("val_accuracy", [(0.5, 0.2), (math.nan, math.nan)], [b"\1", None]),  # it diverges
    ],
)
def test_only_a_trials_own_best_epochs_by_the_metric_carry_a_model(
    reports: list[dict[str, Any]],
    metric: Metric,
    values: list[tuple[float, float]],
    models: list[bytes | None],
) -> None:
    run(metric, epochs_of(*values))
    assert [report["model"] for report in reports] == models
    assert {report["state"] for report in reports} == {b"state"}


@pytest.mark.parametrize(
    ("given", "threads"), [("", 1), ("abc", 1), ("0", 1), ("-2", 1), ("3", 3), ("4,2", 4)]
)
def test_threads_are_those_given_if_they_are_a_number(
    given: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads_given() == threads
