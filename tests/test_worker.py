"""What a worker does: one assignment, epoch by epoch, scripted or for real."""

import math
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune
from support.drivers import Searches, die_at, history_of
from support.epochs import epoch_metrics
from support.scripted import train_little

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Split
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.history import Assignment, History
from tune_mnist.tuning.worker import TrialEpoch, run_trial

pytest_plugins = ["support.ray_fixtures"]

SPACE = """
epochs: 3
parameters:
  lr: {low: 0.001, high: 0.1, log: true}
  momentum: {low: 0.5, high: 0.95}
  schedule: {choices: [constant, onecycle]}
  rotation: {low: 0.0, high: 15.0}
  dropout: {low: 0.0, high: 0.3}
  ema_decay: {choices: [0.0, 0.9]}
start:
  - {lr: 0.03, momentum: 0.9, schedule: onecycle, rotation: 10.0, dropout: 0.1, ema_decay: 0.9}
"""


def test_a_resumed_real_trial_ends_as_if_never_interrupted(searches: Searches) -> None:
    space = searches.path / "space.yaml"
    space.write_text(SPACE)
    arguments = ("--trials", 2, "--max-concurrent", 1)
    driver = searches.start("whole", *arguments, space=space, script=train_little)
    assert driver.wait() == 0, driver.output
    driver = searches.start(
        *("broken", *arguments),
        space=space,
        script=train_little,
        prepare=partial(die_at, History, "add_epoch", 5, after=True),  # in the second trial
    )
    assert driver.wait() == -signal.SIGKILL, driver.output
    driver = searches.resume("broken", "--max-concurrent", 1, script=train_little)
    assert driver.wait() == 0, driver.output
    whole, broken = searches.folder("whole"), searches.folder("broken")
    assert numbers_of(broken) == numbers_of(whole)
    assert [len(numbers) for numbers in numbers_of(whole)] == [3, 3]
    one, other = (weights_in(folder / "best.pt") for folder in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    content: dict[str, dict[str, torch.Tensor]] = torch.load(path, weights_only=True)
    return content["weights"]


def numbers_of(folder: Path) -> list[list[dict[str, Any]]]:
    """Return all metrics of the trials' epochs but the times that they took."""
    times = ("seconds", "evaluation_seconds", "elapsed")
    return [
        [{name: vars(row)[name] for name in vars(row) if name not in times} for row in record.rows]
        for record in history_of(folder).trials.values()
    ]


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
