"""Four things that Ray Tune's own wiring of Optuna and ASHA does, and what a search does here."""

import inspect
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.cluster_utils import Cluster
from support.drivers import (
    PATIENCE,
    act_at,
    die,
    fork,
    history_of,
    notes_of,
    outcome_of,
    searches_in,
    study_of,
    wait_for,
)
from support.plain_wiring import EPOCHS, plain_restore, plain_search
from support.scripted import Script

from tune_mnist.runs.history import History, TrialRecord

pytest_plugins = ["support.ray_fixtures"]

GOOD, POOR, DIVERGING = ({"accuracy": value, "hangs": False} for value in (0.8, 0.1, 0.7))
LATE = {"accuracy": 0.1, "hangs": True}  # as poor, but does not get to its first report


@pytest.fixture(scope="module")
def plain(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[FrozenTrial]:
    """The study of a plain search: a good trial, a poor one and one that diverges."""
    path = tmp_path_factory.mktemp("plain")
    process = fork(
        *(plain_search, path / "output", cluster.address, path, [GOOD, POOR, DIVERGING])
    )
    process.join(PATIENCE)
    assert process.exitcode == 0, (path / "output").read_text()
    return plain_study(path)


OURS = ("--trials", 8, "--epochs", EPOCHS, "--max-concurrent", 1)
SCRIPT = Script(seconds=0.005, diverging={3: (2,)})


@pytest.fixture(scope="module")
def ours(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A search here, of which trial 3 diverges."""
    with searches_in(tmp_path_factory.mktemp("ours"), cluster.address) as searches:
        driver = searches.start("run", *OURS, script=SCRIPT)
        assert driver.wait() == 0, driver.output
        yield searches.folder("run")


def stopped_in(folder: Path) -> list[TrialRecord]:
    """Return the trials that ASHA stopped."""
    trials = history_of(folder).trials.values()
    return [record for record in trials if record.state == "stopped"]


def plain_study(path: Path) -> list[FrozenTrial]:
    study = optuna.load_study(study_name="plain", storage=f"sqlite:///{path / 'study.db'}")
    return study.get_trials()


def test_a_trial_that_asha_stops_is_pruned_and_keeps_its_last_report(
    plain: list[FrozenTrial], ours: Path
) -> None:
    assert plain[1].state == TrialState.COMPLETE  # wrong: after one epoch of five
    assert plain[1].intermediate_values == {}  # wrong: it has reported
    assert plain[1].value == pytest.approx(0.11)

    assert stopped_in(ours)
    for record in stopped_in(ours):
        trial = study_of(ours)[record.number]
        assert trial.state == TrialState.PRUNED
        assert len(trial.intermediate_values) == record.epochs < EPOCHS


def test_a_trial_that_diverges_ends_there_and_does_not_stay_running(
    plain: list[FrozenTrial], ours: Path
) -> None:
    assert plain[2].state == TrialState.RUNNING  # wrong: and TPE steers around it for good
    assert max(plain[2].intermediate_values) >= EPOCHS - 1  # wrong: it was never stopped

    record = history_of(ours).trials[3]
    assert (record.state, record.epochs) == ("diverged", 2)
    trials = study_of(ours)
    assert trials[3].state == TrialState.PRUNED
    assert trials[3].value == trials[3].intermediate_values[1]
    assert TrialState.RUNNING not in {trial.state for trial in trials}


@pytest.fixture(scope="module")
def plain_killed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """The epochs of a plain search that was killed in its second trial, then restored."""
    path = tmp_path_factory.mktemp("plain-killed")
    process = fork(plain_search, path / "output", cluster.address, path, [GOOD, LATE])
    wait_for(process, lambda: started_late(path), path / "output")
    process.kill()
    process.join(PATIENCE)
    (path / "restored").touch()
    process = fork(plain_restore, path / "output", cluster.address, path)
    process.join(PATIENCE)
    assert process.exitcode == 0, (path / "output").read_text()
    return notes_of(path)


def started_late(path: Path) -> bool:
    """Return True once Tune's snapshot has the first trial ended and the second running."""
    snapshots = sorted((path / "plain").glob("experiment_state-*.json"))
    content = snapshots[-1].read_text() if snapshots else ""
    return "TERMINATED" in content and "RUNNING" in content


@pytest.fixture(scope="module")
def ours_killed(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, ours: Path
) -> Iterator[tuple[Path, Counter[str]]]:
    """The same search, killed as a trial starts that is to be stopped, then given one more."""
    with searches_in(tmp_path_factory.mktemp("ours-killed"), cluster.address) as searches:
        script = replace(SCRIPT, notes=searches.notes)
        call = stopped_in(ours)[0].number + 1
        prepare = partial(act_at, History, "start_trial", call, die, after=True)
        driver = searches.start("run", *OURS, script=script, prepare=prepare)
        assert driver.wait() == -signal.SIGKILL, driver.output
        driver = searches.resume("run", "--trials", 9, "--max-concurrent", 1, script=script)
        assert driver.wait() == 0, driver.output
        yield searches.folder("run"), notes_of(searches.notes)


@pytest.mark.slow
def test_asha_remembers_what_it_saw_before_a_restart(
    plain_killed: Counter[str], ours: Path, ours_killed: tuple[Path, Counter[str]]
) -> None:
    assert plain_killed["0.1 2"] == 1  # wrong: without the kill it was stopped after one epoch

    folder, _ = ours_killed
    number = stopped_in(ours)[0].number
    assert history_of(folder).trials[number].state == "stopped"
    assert outcome_of(folder)[:8] == outcome_of(ours)


@pytest.mark.slow
def test_a_resumed_search_runs_nothing_again_and_may_have_more_trials(
    ours_killed: tuple[Path, Counter[str]],
) -> None:
    restore = inspect.signature(tune.Tuner.restore).parameters
    assert not {"num_samples", "tune_config", "time_budget_s"} & restore.keys()  # wrong

    folder, trained = ours_killed
    assert len(history_of(folder).trials) == 9
    assert not history_of(folder).unfinished()
    assert set(trained.values()) == {1}
