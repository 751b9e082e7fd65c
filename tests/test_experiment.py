"""The course of a search, trial by trial and epoch by epoch, with neither Ray nor training."""

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from support.course import Course
from support.drivers import replace
from support.epochs import epoch_metrics
from support.scripted import unpacked

from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.history import History

EPOCHS = 9


def good() -> list[float]:
    return [0.9 + 0.01 * epoch for epoch in range(EPOCHS)]


@pytest.fixture
def course(tmp_path: Path) -> Course:
    return Course(tmp_path / "run")


DIVERGED = "the loss was not finite at step 5 of epoch "


@pytest.mark.parametrize(
    ("accuracies", "state", "optuna_state", "reason", "best"),
    [
        ([*good()[:-1], 0.5], "complete", TrialState.COMPLETE, "", "2 8"),
        ([0.95, 0.96, 0.97, 0.7], "stopped", TrialState.PRUNED, "among the poorer ones", "2 3"),
        ([0.95, math.nan], "diverged", TrialState.PRUNED, f"{DIVERGED}2", "2 1"),
        ([math.nan], "diverged", TrialState.FAIL, f"{DIVERGED}1", "0 9"),
        ([0.95], "failed", TrialState.FAIL, "the worker died", "2 1"),
    ],
    ids=["complete", "stopped", "diverged", "diverged at once", "failed"],
)
def test_a_trial_ends_with_every_finite_report_and_the_last_as_its_value(
    course: Course,
    accuracies: list[float],
    state: str,
    optuna_state: TrialState,
    reason: str,
    best: str,
) -> None:
    for _ in range(2):  # the baseline, and one that stands in the rungs
        course.trial(*(value - 0.1 for value in good()))
    number = course.start()
    for accuracy in accuracies:
        step = 5 if math.isnan(accuracy) else None
        told_to_stop = course.epoch(number, accuracy, diverged_step=step)
    assert told_to_stop == (state != "failed")
    if told_to_stop:
        course.experiment.finish(number)
    else:
        course.experiment.fail(number, reason)
    record, trial = course.history.trials[number], course.optuna(number)
    assert (record.state, trial.state) == (state, optuna_state)
    assert record.reason.startswith(reason)
    finite = {epoch: value for epoch, value in enumerate(accuracies, 1) if not math.isnan(value)}
    assert trial.intermediate_values == finite
    assert trial.value == (finite[max(finite)] if finite and state != "failed" else None)
    assert trial.user_attrs == {"ray_trial_id": "ray", "state": state, "reason": record.reason}
    assert unpacked(course.folder.best_model) == best
    assert course.checkpoints.load(course.history.trials[number]) is None


def test_what_is_broken_off_waits_in_the_file_and_runs_again(tmp_path: Path) -> None:
    course = Course(tmp_path / "run", has_file=True)
    number = course.start()
    course.epoch(number, 0.9)
    assert course.experiment.close("SIGTERM") is None
    assert in_file(course)[0].state == TrialState.WAITING
    course.again()
    assert course.start() == number
    assert not course.epoch(number, 0.91)
    assert course.experiment.close("finished") is None
    assert in_file(course)[0].intermediate_values == {1: 0.9, 2: 0.91}
    course.again()
    assert course.start() == number
    while not course.epoch(number, 0.92):
        pass
    course.experiment.finish(number)
    assert course.experiment.close("finished") is None
    assert [trial.state for trial in in_file(course)] == [TrialState.COMPLETE]


def in_file(course: Course) -> list[FrozenTrial]:
    study = optuna.load_study(study_name="tune_mnist", storage=f"sqlite:///{course.folder.study}")
    return study.get_trials()


@pytest.mark.parametrize("metric", ["val_accuracy", "test_accuracy"])
def test_everything_goes_by_the_chosen_metric(tmp_path: Path, metric: Metric) -> None:
    course = Course(tmp_path / "run", metric=metric)
    for _ in range(2):  # the second, better by the metric and worse by the other, continues
        number = course.start()
        for epoch in range(EPOCHS):
            chosen, other = (0.9 + number / 100, 0.5 - number / 10)
            val, test = (chosen, other) if metric == "val_accuracy" else (other, chosen)
            stop = course.epoch(number, val + epoch / 1000, test + epoch / 1000)
            assert stop == (epoch == EPOCHS - 1)
        course.experiment.finish(number)
    assert course.optuna(1).value == course.history.trials[1].rows[-1].accuracy(metric)
    assert unpacked(course.folder.best_model) == f"1 {EPOCHS}"


def test_without_start_points_the_baseline_is_first_and_never_stopped(
    course: Course,
) -> None:
    assert course.start() == 0
    assert course.history.trials[0].config == course.rules.space.baseline()
    for _ in range(3):
        course.trial(*good())
    assert [course.epoch(0, 0.1) for _ in range(EPOCHS)] == [False] * (EPOCHS - 1) + [True]
    course.experiment.finish(0)
    assert course.history.trials[0].state == "complete"


START = ["start"] * 3  # those of `default`


def origins(course: Course) -> list[str]:
    return [record.origin for record in course.history.trials.values()]


def test_a_baseline_that_learns_fast_at_first_stops_nobody(tmp_path: Path) -> None:
    """The first epochs of `default` at full size, with search seed 1: all three were stopped."""
    course = Course(tmp_path / "run", space="default")
    first_epochs = (0.9784, 0.9750, 0.9764, 0.9816, 0.9770)
    told_to_stop = [course.epoch(course.start(), value) for value in first_epochs]
    assert origins(course) == [*START, "baseline", "sampled"]
    assert told_to_stop == [False, True, True, False, False]  # the fourth counts for nobody


@pytest.mark.parametrize(
    ("sessions", "order"),
    [
        ([{"trials": 6}], [*START, "baseline", "sampled", "sampled"]),
        ([{"trials": 4}], [*START, "baseline"]),
        ([{"trials": 3}], ["start", "start", "baseline"]),
        ([{"trials": 1}], ["baseline"]),
        ([{"trials": 3, "no_start": True}], ["baseline", "sampled", "sampled"]),
        ([{"trials": 3}, {"trials": 5}], ["start", "start", "baseline", "start", "sampled"]),
        # A run of an earlier version, which began with its baseline.
        ([{"trials": 1}, {"trials": 5}], ["baseline", *START, "sampled"]),
    ],
)
def test_start_points_come_first_and_the_baseline_next_or_last(
    tmp_path: Path, sessions: list[dict[str, Any]], order: list[str]
) -> None:
    for rules in sessions:
        course = Course(tmp_path / "run", space="default", **rules)
        while len(course.history.trials) < rules["trials"]:
            course.start()
        course.history.close()
    assert origins(course) == order
    started = [each for each in course.history.trials.values() if each.origin == "start"]
    for record, point in zip(started, course.rules.space.start, strict=False):
        assert {name: getattr(record.config, name) for name in point} == dict(point)


def test_an_epoch_whose_row_a_kill_prevented_is_taken_from_its_checkpoint(course: Course) -> None:
    number = course.start()
    course.epoch(number, 0.9)
    course.epoch(number, 0.91)
    rows = course.folder.epochs.read_text().splitlines(keepends=True)
    course.folder.epochs.write_text("".join(rows[:-1]) + rows[-1][:20])
    course.again()
    assert [row.val_accuracy for row in course.history.trials[number].rows] == [0.9, 0.91]
    assert course.experiment.next_trial("ray").state == b"after 2"


def work(course: Course, values: list[float], epochs: int) -> str:
    """Train as a worker does, for some epochs from the state that it is handed; return that."""
    assignment = course.experiment.next_trial("ray")
    state = (assignment.state or b"").decode()
    first = int(state.removeprefix("after ") or 0) + 1
    for epoch in range(first, min(first + epochs, EPOCHS + 1)):
        course.now += 1
        metrics, state_now = epoch_metrics(epoch, values[epoch - 1]), f"after {epoch}".encode()
        course.experiment.report(assignment.number, metrics, state_now, None)
    return state


@pytest.mark.parametrize(
    ("damaged", "states"),
    [
        (["00000.state"], ["after 2", "after 3", "after 4"]),
        (["00000.state", "00000.before.state"], ["", "after 1", "after 2"]),
    ],
)
def test_epochs_trained_again_from_an_earlier_state_are_recorded_once(
    course: Course, damaged: list[str], states: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    work(course, good(), 3)
    before = course.folder.epochs.read_text()
    for name in damaged:
        (course.folder.checkpoints / name).write_bytes(b"damaged")
    for state in states:  # killed after one more epoch, each time
        course.again()
        assert work(course, good(), 1) == state
    first = capsys.readouterr().out.splitlines()[0]
    where = f"after epoch {states[0][-1]}" if states[0] else "from its beginning"
    assert first.startswith(f"trial 0 continues {where}: its state after epoch 3 is missing or d")
    course.again()
    work(course, good(), EPOCHS)
    course.experiment.finish(0)
    assert course.folder.epochs.read_text().startswith(before)
    assert [row.val_accuracy for row in History.load(course.folder).trials[0].rows] == good()


def test_an_epoch_that_is_reported_twice_counts_once(course: Course) -> None:
    number = course.start()
    course.epoch(number, 0.9)
    again = course.history.trials[number].rows[0]
    assert not course.experiment.report(number, again, b"state", None)
    assert course.history.trials[number].epochs == 1


def test_the_clock_runs_over_all_sessions(tmp_path: Path) -> None:
    course = Course(tmp_path / "run", time_budget=12)
    number = course.start()
    for _ in range(7):
        course.epoch(number, 0.9)
    course.now = 1000.0  # another process, another clock; what lay between does not count
    course.again()
    assert course.experiment.elapsed == pytest.approx(7)
    assert not course.experiment.out_of_time
    course.now += 5
    assert course.experiment.out_of_time


def test_study_db_is_closed_even_where_nothing_else_can_be_written(tmp_path: Path) -> None:
    course = Course(tmp_path / "run", has_file=True)
    course.start()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    replace(course.history, "close_session", full)
    with pytest.raises(OSError, match="No space"):
        course.experiment.close("failed")
    assert in_file(course)[0].state == TrialState.WAITING
