"""A driver is killed as `kill -9` does, at random moments, and the search is resumed."""

import contextlib
import random
import time
from pathlib import Path

import pytest
from support.course import Course
from support.drivers import Driver, Searches, epochs_in, history_of, notes_of, outcome, outcome_of
from support.scripted import Script

from tune_mnist.runs.space import load_space

pytest_plugins = ["support.ray_fixtures"]
pytestmark = pytest.mark.slow

TRIALS = 30


class Killer:
    """Kills a driver at random moments: some counted in time, some in epochs."""

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
    """Kill a search `kills` times, resume it each time, and let it finish."""
    script = Script(seconds=0.005, notes=searches.notes)
    killer, folder = Killer(seed), searches.folder("killed")
    limit = ("--max-concurrent", at_once)
    driver = searches.start("killed", "--trials", trials, *limit, script=script)
    for _ in range(kills):
        assert killer.strike(driver, folder), ("it had finished before", killer.log)
        driver = searches.resume("killed", *limit, script=script)
    assert driver.wait() == 0, (killer.log, driver.output)
    history = history_of(folder)  # which refuses rows that are doubled or out of order
    trained = notes_of(searches.notes)
    assert {f"{record.number} {row.epoch}" for record, row in history.rows} == set(trained)
    assert trained.total() - len(history.rows) <= kills * at_once  # only what was under way
    assert len(history.trials) == trials
    assert not history.unfinished()
    return folder


def test_one_trial_at_a_time_comes_to_what_the_unbroken_search_does(
    searches: Searches, tmp_path: Path
) -> None:
    folder = search_with_kills(searches, seed=1, kills=18, trials=TRIALS, at_once=1)
    epochs = load_space("sgd").epochs
    unbroken = Course(tmp_path / "unbroken", trials=TRIALS, epochs=epochs, startup_trials=10)
    unbroken.run(until=TRIALS)
    assert outcome_of(folder) == outcome(unbroken.history)
    assert (folder / "best.pt").read_bytes() == unbroken.folder.best_model.read_bytes()
    assert not list((folder / "checkpoints").iterdir())


def test_two_trials_at_a_time_lose_and_repeat_nothing(searches: Searches) -> None:
    search_with_kills(searches, seed=2, kills=7, trials=25, at_once=2)
