"""One quick test of a real search for each promise; the slow tests try them in all their forms."""

import io
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from optuna.trial import TrialState
from support.course import Course
from support.drivers import (
    Searches,
    act_at,
    die,
    history_of,
    notes_of,
    outcome,
    outcome_of,
    study_of,
)
from support.scripted import Script, train_little

from tune_mnist.mnist.data import Mnist, split
from tune_mnist.mnist.metrics import METRICS, EpochMetrics
from tune_mnist.runs.history import Assignment, History

pytest_plugins = ["support.ray_fixtures"]

TRIALS, EPOCHS = 8, 4
SMALL = ("--trials", TRIALS, "--epochs", EPOCHS, "--startup-trials", 4)
ONE = ("--max-concurrent", 1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """The search that nothing happens to, in this process."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    course = Course(path, trials=TRIALS, epochs=EPOCHS, startup_trials=4)
    course.run(until=TRIALS)
    return course


def check_it_ended_as(undisturbed: Course, folder: Path) -> None:
    assert outcome_of(folder) == outcome(undisturbed.history)
    assert (folder / "best.pt").read_bytes() == undisturbed.folder.best_model.read_bytes()


def test_a_search_killed_twice_and_with_a_killed_worker_loses_and_repeats_nothing(
    searches: Searches, undisturbed: Course
) -> None:
    kills = ((0, 3), (3, 1))  # trial and epoch
    script = Script(
        seconds=0.0,
        notes=searches.notes,
        held={number: (epoch,) for number, epoch in kills},
        killed_once={0: (2,)},
    )
    driver = searches.start("run", *SMALL, *ONE, script=script)
    for number, epoch in kills:
        driver.wait_until(partial(script.is_held, number, epoch))
        driver.kill()
        script.release(number)
        driver = searches.resume("run", *ONE, script=script)
    assert driver.wait() == 0, driver.output
    folder = searches.folder("run")
    check_it_ended_as(undisturbed, folder)
    assert history_of(folder).trials[0].retries == 1
    # A worker may finish the epoch that it was held in after its driver has gone.
    assert notes_of(searches.notes).total() - len(history_of(folder).rows) <= len(kills)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_search_ended_by_a_signal_is_resumed_from_a_copy_of_its_folder(
    number: signal.Signals, searches: Searches, undisturbed: Course
) -> None:
    script = Script(seconds=0.0, notes=searches.notes, held={2: (1,)})
    driver = searches.start("run", *SMALL, *ONE, script=script)
    driver.wait_until(lambda: script.is_held(2, 1))
    driver.send(number)
    assert driver.wait() == 128 + number, driver.output
    folder = searches.folder("run")
    assert f"--resume {folder}" in driver.output
    assert history_of(folder).closed_as == number.name
    assert [trial.state for trial in study_of(folder)][2:] == [TrialState.WAITING]

    script.release()
    shutil.copytree(folder, searches.folder("copy"))
    driver = searches.resume("copy", *ONE, script=script)
    assert driver.wait() == 0, driver.output
    check_it_ended_as(undisturbed, searches.folder("copy"))
    assert history_of(folder).closed_as == number.name


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


def test_a_real_training_that_was_killed_ends_as_the_unbroken_one_to_the_last_digit(
    searches: Searches, mnist: Mnist, one_thread: None
) -> None:
    space = searches.path / "space.yaml"
    space.write_text(SPACE)
    driver = searches.start(
        *("run", "--trials", 2, *ONE),
        space=space,
        script=train_little,
        prepare=partial(act_at, History, "add_epoch", 5, die, after=True),  # in the second trial
    )
    assert driver.wait() == -signal.SIGKILL, driver.output
    driver = searches.resume("run", *ONE, script=train_little)
    assert driver.wait() == 0, driver.output

    folder = searches.folder("run")
    best = torch.load(folder / "best.pt", weights_only=True)
    data = split(mnist, holdout=True, images=1000)
    for record in history_of(folder).trials.values():
        assignment = Assignment(record.number, record.config, record.seed, 3, "val_accuracy", None)
        for row, epoch in zip(record.rows, train_little(assignment, data), strict=True):
            assert computed(row) == computed(epoch.metrics)
            if (row.trial, row.epoch) == (best["trial"], best["epoch"]):
                weights = torch.load(io.BytesIO(epoch.model()), weights_only=True)["weights"]
                assert all(torch.equal(best["weights"][name], weights[name]) for name in weights)


def computed(epoch: EpochMetrics) -> list[float | None]:
    """Return all that an epoch came to but the times that it took."""
    return [getattr(epoch, name) for name in METRICS if "seconds" not in name]
