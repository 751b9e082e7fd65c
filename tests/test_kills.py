"""A driver is killed as `kill -9` does, at any instant, and the search is gone on with."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from support.drivers import (
    Driver,
    Searches,
    die_at,
    epochs_in,
    history_of,
    notes_of,
    outcome_of,
    searches_in,
)
from support.scripted import Script

from tune_mnist.runs.checkpoints import Checkpoints
from tune_mnist.runs.files import AppendLog
from tune_mnist.runs.history import History

pytest_plugins = ["support.ray_fixtures"]

TRIALS = 30


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A search of one trial at a time that nothing befell."""
    with searches_in(tmp_path_factory.mktemp("runs"), cluster.address) as searches:
        driver = searches.start("calm", "--trials", TRIALS, "--max-concurrent", 1)
        assert driver.wait() == 0, driver.output
        yield searches.folder("calm")


class Killer:
    """Kills a driver at random instants: some counted in time, some in epochs."""

    def __init__(self, seed: int) -> None:
        self._random, self.log = random.Random(seed), [f"seed {seed}"]

    def strike(self, driver: Driver, folder: Path) -> bool:
        """Kill the driver of the run in `folder`, or return False where it ended before."""
        before = _sessions(folder)
        driver.wait_until(lambda: _sessions(folder) > before)
        if self._random.random() < 0.6:
            delay = self._random.uniform(0, 1.5)
            self.log.append(f"killed {delay:.3f} s after its start")
        else:
            more, delay = self._random.randint(1, 25), self._random.uniform(0, 0.02)
            self.log.append(f"killed {delay:.4f} s after {more} epochs")
            goal = epochs_in(folder) + more
            with contextlib.suppress(pytest.fail.Exception):
                driver.wait_until(lambda: epochs_in(folder) >= goal)
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline and driver.is_alive:
            time.sleep(0.0005)
        if not driver.is_alive:
            assert driver.wait() == 0, driver.output
            return False
        driver.kill()
        return True


def _sessions(folder: Path) -> int:
    events = folder / "events.jsonl"
    return events.read_bytes().count(b'"session"') if events.exists() else 0


def search_with_kills(
    searches: Searches, *, seed: int, kills: int, trials: int, at_once: int
) -> Path:
    """Kill a search `kills` times, each time going on with it, and let it finish."""
    notes = searches.path / "notes"
    notes.mkdir()
    settings: dict[str, Any] = {"script": Script(seconds=0.005, notes=notes)}
    killer, folder = Killer(seed), searches.folder("killed")
    driver = searches.start("killed", "--trials", trials, "--max-concurrent", at_once, **settings)
    for _ in range(kills):
        assert killer.strike(driver, folder), ("it had finished before", killer.log)
        driver = searches.resume("killed", "--max-concurrent", at_once, **settings)
    assert driver.wait() == 0, (killer.log, driver.output)
    check_no_epoch_is_lost(folder, notes, allowed=kills * at_once)
    return folder


def check_no_epoch_is_lost(folder: Path, notes: Path, *, allowed: int) -> None:
    """See that only epochs that were under way when something happened were trained again."""
    history = history_of(folder)  # which refuses rows that are doubled, or out of order
    rows = {f"{record.number} {row.epoch}" for record, row in history.rows}
    trained = notes_of(notes)
    assert rows == set(trained)
    assert trained.total() - len(rows) <= allowed
    assert not history.unfinished()


def test_one_trial_at_a_time_comes_to_what_the_unbroken_search_does(
    searches: Searches, uninterrupted: Path
) -> None:
    folder = search_with_kills(searches, seed=1, kills=18, trials=TRIALS, at_once=1)
    assert outcome_of(folder) == outcome_of(uninterrupted)
    assert (folder / "best.pt").read_bytes() == (uninterrupted / "best.pt").read_bytes()
    assert (folder / "best.csv").read_text() == (uninterrupted / "best.csv").read_text()


def test_two_trials_at_a_time_lose_and_repeat_nothing(searches: Searches) -> None:
    folder = search_with_kills(searches, seed=2, kills=7, trials=25, at_once=2)
    assert len(history_of(folder).trials) == 25


def tear(folder: Path) -> None:
    """Leave the files as a kill in the middle of their writing does."""
    for name in ("epochs.csv", "events.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"event": "end", "tri')
    for path in (folder / "checkpoints").glob("*.state"):
        if "before" not in path.name:
            os.truncate(path, path.stat().st_size // 2)
    (folder / ".search.yaml.123.tmp").write_text("half of")


def test_a_kill_between_two_writes_costs_an_epoch_at_most(
    searches: Searches, uninterrupted: Path
) -> None:
    notes = searches.path / "notes"
    notes.mkdir()
    settings: dict[str, Any] = {"script": Script(seconds=0.005, notes=notes)}
    points: list[Callable[[], None]] = [
        partial(die_at, History, "start_trial", 1, after=True),  # started, but with no worker
        partial(die_at, History, "add_epoch", 5, after=False),  # checkpoint, but no row
        partial(die_at, Checkpoints, "save", 1, after=False),  # best.pt, but no checkpoint
        partial(die_at, Checkpoints, "save", 9, after=True),
        partial(die_at, History, "end_trial", 1, after=False),  # told to stop, but not ended
        partial(die_at, Checkpoints, "remove", 1, after=False),  # ended, but with checkpoint
        partial(die_at, AppendLog, "close", 1, after=False),  # all done, but not closed
    ]
    folder = searches.folder("killed")
    for count, prepare in enumerate(points):
        begin = searches.resume if folder.exists() else partial(searches.start, "killed")
        arguments = ("killed",) if folder.exists() else ("--trials", TRIALS)
        driver = begin(*arguments, "--max-concurrent", 1, prepare=prepare, **settings)
        assert driver.wait() == -signal.SIGKILL, (count, driver.output)
        if count == 3:
            tear(folder)
    driver = searches.resume("killed", "--max-concurrent", 1, **settings)
    assert driver.wait() == 0, driver.output
    assert outcome_of(folder) == outcome_of(uninterrupted)
    check_no_epoch_is_lost(folder, notes, allowed=len(points) + 1)
    assert not list((folder / "checkpoints").iterdir())
