"""Four things that Ray Tune's own wiring of Optuna and ASHA does, and what a search does here."""

import inspect
import math
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.cluster_utils import Cluster
from support.course import Course
from support.drivers import PATIENCE, fork, notes_of, wait_for
from support.plain_wiring import EPOCHS, plain_restore, plain_search

pytest_plugins = ["support.ray_fixtures"]

GOOD, POOR, DIVERGING = ({"accuracy": value, "hangs": False} for value in (0.8, 0.1, 0.7))
LATE = {"accuracy": 0.1, "hangs": True}  # as poor, but does not get to its first report


@pytest.fixture(scope="module")
def plain(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[FrozenTrial]:
    """The study of a plain search: a good trial, a poor one and one that diverges."""
    path = tmp_path_factory.mktemp("plain")
    points = [GOOD, POOR, DIVERGING]
    process = fork(plain_search, path / "output", cluster.address, path, points)
    process.join(PATIENCE)
    assert process.exitcode == 0, (path / "output").read_text()
    study = optuna.load_study(study_name="plain", storage=f"sqlite:///{path / 'study.db'}")
    return study.get_trials()


@pytest.fixture
def ours(tmp_path: Path) -> Course:
    """A search here with the same three trials, after its baseline."""
    course = Course(tmp_path / "ours", epochs=EPOCHS)
    course.trial(*[0.7] * EPOCHS)
    course.trial(*(0.8 + epoch / 100 for epoch in range(1, EPOCHS + 1)))
    course.trial(0.11)
    course.trial(0.81, math.nan)
    return course


@pytest.mark.slow
def test_a_plain_search_completes_what_asha_stops_and_leaves_running_what_diverges(
    plain: list[FrozenTrial],
) -> None:
    assert plain[1].state == TrialState.COMPLETE  # wrong: after one epoch of five
    assert plain[1].intermediate_values == {}  # wrong: it has reported
    assert plain[1].value == pytest.approx(0.11)
    assert plain[2].state == TrialState.RUNNING  # wrong: and TPE steers around it for good
    assert max(plain[2].intermediate_values) >= EPOCHS - 1  # wrong: it was never stopped


def test_here_both_are_pruned_and_keep_their_last_report(ours: Course) -> None:
    records = ours.history.trials
    assert (records[2].state, records[2].epochs) == ("stopped", 1)
    assert (records[3].state, records[3].epochs) == ("diverged", 2)
    assert {ours.optuna(number).state for number in (2, 3)} == {TrialState.PRUNED}
    assert ours.optuna(2).intermediate_values == {1: 0.11}
    assert ours.optuna(3).value == 0.81


def started_late(path: Path) -> bool:
    """Return True once Tune's snapshot has the first trial ended and the second running."""
    snapshots = sorted((path / "plain").glob("experiment_state-*.json"))
    content = snapshots[-1].read_text() if snapshots else ""
    return "TERMINATED" in content and "RUNNING" in content


@pytest.mark.slow
def test_plain_asha_forgets_what_it_saw_before_a_restart(cluster: Cluster, tmp_path: Path) -> None:
    """A search here remembers: test_kill_points.py."""
    output = tmp_path / "output"
    process = fork(plain_search, output, cluster.address, tmp_path, [GOOD, LATE])
    wait_for(process, lambda: started_late(tmp_path), output)
    process.kill()
    process.join(PATIENCE)
    (tmp_path / "restored").touch()
    process = fork(plain_restore, output, cluster.address, tmp_path)
    process.join(PATIENCE)
    assert process.exitcode == 0, output.read_text()
    trained = notes_of(tmp_path)
    assert trained["0.1 2"] == 1  # wrong: without the kill it was stopped after one epoch


def test_a_plain_search_cannot_be_restored_with_more_trials() -> None:
    """A search here can be resumed with more: test_launch.py."""
    restore = inspect.signature(tune.Tuner.restore).parameters
    assert not {"num_samples", "tune_config", "time_budget_s"} & restore.keys()
