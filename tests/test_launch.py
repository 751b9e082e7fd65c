"""Beginning, ending and going on with searches, each a process of its own."""

import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.trial import TrialState
from ray.cluster_utils import Cluster
from support.drivers import (
    Driver,
    Searches,
    epochs_in,
    history_of,
    outcome_of,
    replace,
    searches_in,
    study_of,
)
from support.scripted import Script

from tune_mnist.errors import SearchFailedError
from tune_mnist.runs.history import History
from tune_mnist.tuning import packing as sharing

pytest_plugins = ["support.ray_fixtures"]

TWO = ("--max-concurrent", 2)
SLOW = Script(seconds=0.05)


@pytest.fixture(scope="module")
def finished(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searches]:
    """A search that has run to its end."""
    with searches_in(tmp_path_factory.mktemp("runs"), cluster.address) as searches:
        driver = searches.start("run", "--trials", 4)
        assert driver.wait() == 0, driver.output
        yield searches


def end(driver: Driver, folder: Path, *signals: signal.Signals) -> int:
    """Send signals once epochs come in, and return the exit code."""
    before = epochs_in(folder)
    driver.wait_until(lambda: epochs_in(folder) > before + 3)
    for number in signals:
        driver.send(number)
    return driver.wait()


def test_signals_end_a_search_in_order_and_it_goes_on(searches: Searches) -> None:
    folder = searches.folder("run")
    whole = ("--grace-epochs", 20)
    driver = searches.start("run", "--trials", 12, *TWO, *whole, script=SLOW)
    assert end(driver, folder, signal.SIGTERM) == 128 + signal.SIGTERM
    assert f"--resume {folder}" in driver.output
    assert history_of(folder).closed_as == "SIGTERM"
    assert TrialState.RUNNING not in {trial.state for trial in study_of(folder)}
    assert TrialState.WAITING in {trial.state for trial in study_of(folder)}
    assert (folder / "trials.csv").read_text().count(",running,") == 2

    driver = searches.resume("run", *TWO, script=SLOW)
    assert end(driver, folder, signal.SIGINT) == 128 + signal.SIGINT
    assert history_of(folder).closed_as == "SIGINT"

    driver = searches.resume("run", *TWO)
    assert driver.wait() == 0, driver.output
    history = history_of(folder)
    assert len(history.trials) == 12
    assert not history.unfinished()
    assert {trial.state for trial in study_of(folder)} <= {TrialState.COMPLETE, TrialState.PRUNED}


def linger(mark: Path) -> None:
    """Make this process take forever over its end, unless it is ended at once."""

    def forever(*_: Any) -> None:
        mark.touch()
        signal.pause()
        raise RuntimeError("the second signal was not heeded")

    replace(History, "close_session", forever)


def test_a_second_signal_ends_a_search_at_once(searches: Searches) -> None:
    folder = searches.folder("run")
    prepare = partial(linger, folder / "lingers")
    driver = searches.start("run", "--trials", 12, *TWO, script=SLOW, prepare=prepare)
    driver.wait_until(lambda: epochs_in(folder) > 3)
    driver.send(signal.SIGTERM)
    driver.wait_until((folder / "lingers").exists)
    driver.send(signal.SIGTERM)
    assert driver.wait(10) == 128 + signal.SIGTERM
    assert history_of(folder).closed_as is None


def test_of_two_searches_with_one_name_one_is_refused(searches: Searches) -> None:
    drivers = [searches.start("run", "--trials", 3, script=SLOW) for _ in range(2)]
    codes = [driver.wait() for driver in drivers]
    assert sorted(codes) == [0, 2]
    assert "exists and is never overwritten" in drivers[codes.index(2)].output
    assert len(history_of(searches.folder("run")).trials) == 3


def test_a_run_that_is_under_way_cannot_be_resumed(searches: Searches) -> None:
    folder = searches.folder("run")
    driver = searches.start("run", "--trials", 4, *TWO, script=SLOW)
    driver.wait_until(lambda: epochs_in(folder) > 0)
    other = searches.resume("run")
    assert other.wait() == 2
    assert "in use" in other.output
    assert driver.wait() == 0, driver.output


def test_two_searches_run_side_by_side_on_one_ray(searches: Searches) -> None:
    drivers = [
        searches.start(name, "--trials", 4, "--max-concurrent", 1) for name in ("one", "two")
    ]
    assert [driver.wait() for driver in drivers] == [0, 0]
    assert outcome_of(searches.folder("one")) == outcome_of(searches.folder("two"))


def test_two_searches_run_side_by_side_each_with_a_ray_of_its_own(tmp_path: Path) -> None:
    with searches_in(tmp_path, address=None) as searches:
        drivers = [
            searches.start(name, "--trials", 3, "--max-concurrent", 1) for name in ("one", "two")
        ]
        assert [driver.wait() for driver in drivers] == [0, 0], drivers[0].output
        assert outcome_of(searches.folder("one")) == outcome_of(searches.folder("two"))


def test_a_finished_run_says_so_and_goes_on_with_more_trials(finished: Searches) -> None:
    folder = finished.folder("run")
    before = outcome_of(folder)
    driver = finished.resume("run")
    assert driver.wait() == 0
    assert "all 4 trials are finished" in driver.output
    assert history_of(folder).sessions == 1

    driver = finished.resume("run", "--trials", 6)
    assert driver.wait() == 0, driver.output
    assert len(history_of(folder).trials) == 6
    assert outcome_of(folder)[:4] == before


@pytest.mark.parametrize("begin", ["start", "resume"])
def test_a_trial_that_fits_nowhere_is_refused_at_once(finished: Searches, begin: str) -> None:
    run, trials = ("run", 9) if begin == "resume" else ("other", 4)
    driver = getattr(finished, begin)(run, "--trials", trials, "--cpus-per-trial", 64)
    assert driver.wait() == 2
    assert "no node can run a trial of 64 CPUs: there is 1 node of 2 CPUs" in driver.output
    assert len(driver.output.splitlines()) == 1
    assert history_of(finished.folder("run")).sessions <= 2
    assert not finished.folder("other").exists()


def test_a_used_up_time_budget_says_so_and_can_be_raised(searches: Searches) -> None:
    folder = searches.folder("run")
    script = Script(seconds=0.5)
    driver = searches.start("run", "--trials", 3, "--time-budget", "5s", script=script)
    assert driver.wait() == 0, driver.output
    history = history_of(folder)
    assert history.closed_as == "out of time"
    assert history.unfinished()
    assert history.elapsed >= 5
    driver = searches.resume("run")
    assert driver.wait() == 0
    assert "time budget" in driver.output
    driver = searches.resume("run", "--time-budget", "1h")
    assert driver.wait() == 0, driver.output
    assert len(history_of(folder).trials) == 3
    assert not history_of(folder).unfinished()


def test_a_resume_says_what_has_changed_since(tmp_path: Path, cluster: Cluster) -> None:
    space = tmp_path / "mine.yaml"
    space.write_text("epochs: 4\nparameters:\n  lr: {low: 0.001, high: 0.1, log: true}\n")
    with searches_in(tmp_path, cluster.address) as searches:
        settings: dict[str, Any] = {"script": SLOW, "prepare": partial(stop_after, 3)}
        driver = searches.start("run", "--trials", 2, space=space, **settings)
        assert driver.wait() == 128 + signal.SIGTERM, driver.output
        search = searches.folder("run") / "search.yaml"
        code = yaml.safe_load(search.read_text())["versions"]["code"]
        search.write_text(search.read_text().replace(code, "0123456789ab"))
        space.write_text(space.read_text().replace("high: 0.1", "high: 0.2"))
        driver = searches.resume("run")
        assert driver.wait() == 0, driver.output
        output = " ".join(driver.output.split())
        assert f"code was 0123456789ab, is now {code}" in output
        assert re.search(r"mine.yaml: parameters.lr.high was 0.1, is now 0.2", output)


def stop_after(epochs: int) -> None:
    """Have this process take SIGTERM after so many epochs."""
    left = [epochs]

    def counting(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    original = replace(History, "add_epoch", counting)


def stop_before_the_first_trial() -> None:
    """Have this process take SIGTERM as soon as it has joined Ray."""

    def stopping() -> Any:
        signal.raise_signal(signal.SIGTERM)

    replace(sharing, "living_nodes", stopping)


def test_sigterm_before_the_first_trial_has_its_exit_code_too(searches: Searches) -> None:
    driver = searches.start("run", prepare=stop_before_the_first_trial)
    assert driver.wait() == 128 + signal.SIGTERM


def fail_early() -> None:
    """Have this process run into a full disk as its session begins."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "epochs.csv")

    replace(History, "open_session", full)


def test_an_error_as_a_session_begins_is_one_line(searches: Searches) -> None:
    driver = searches.start("run", prepare=fail_early)
    assert driver.wait() == SearchFailedError.exit_code
    assert driver.output.startswith("error: cannot write to epochs.csv (No space left on device)")
    assert len(driver.output.splitlines()) == 1
