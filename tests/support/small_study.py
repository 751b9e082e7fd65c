"""A study with made-up trials, several at once, and the file that it is copied to."""

import contextlib
import copy
import random
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tune_mnist.tuning.settings import SearchOptions
from tune_mnist.tuning.study import Study
from tune_mnist.tuning.study_file import StudyFile

PATIENCE = 60.0  # seconds that anything may take


class SmallStudy:
    """A search that reports made-up values, with several trials at once."""

    def __init__(self, path: Path, seed: int = 0, earlier: Sequence[FrozenTrial] = ()) -> None:
        self.path = path
        self.study = Study(SearchOptions(startup_trials=5), StudyFile(path, "val_accuracy"))
        self._generator = random.Random(seed)
        for trial in earlier:
            self.study.add(trial)
        self.live = [trial.number for trial in earlier if not trial.state.is_finished()]

    def start(self) -> int:
        number = len(self.study.trials())
        fixed = {"lr": 0.05} if number == 1 else {}
        self.study.ask(number, _sample, fixed, {"ray_trial_id": f"ray{number}"})
        self.live.append(number)
        return number

    def report(self, number: int) -> None:
        epoch = len(self.study.trials()[number].intermediate_values) + 1
        self.study.report(number, epoch, self._generator.random())

    def end(self, number: int) -> None:
        self.live.remove(number)
        state = TrialState.FAIL
        if self.study.trials()[number].intermediate_values:
            state = self._generator.choice([TrialState.COMPLETE, TrialState.PRUNED])
        self.study.tell(number, state, {"state": state.name, "reason": "größer ☠"})

    def steps(self, count: int) -> None:
        """Start, report or end a trial, so many times."""
        for _ in range(count):
            chance = self._generator.random()
            if len(self.live) < 2 or (chance < 0.2 and len(self.live) < 5):
                self.start()
            elif chance < 0.8:
                self.report(self._generator.choice(self.live))
            else:
                self.end(self._generator.choice(self.live))

    def recorded(self) -> list[FrozenTrial]:
        """Return the trials as a run's history would know them."""
        trials = copy.deepcopy(self.study.trials())
        for trial in trials:
            if trial.state == TrialState.WAITING:
                trial.state = TrialState.RUNNING
        return trials

    def wait_until_written(self) -> None:
        wait_for(self.path, len(self.study.trials()))


def wait_for(path: Path, trials: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(sqlite3.Error):
            if count_trials(path) >= trials:
                return
        time.sleep(0.01)
    raise AssertionError("the file was not written")


def count_trials(path: Path) -> int:
    """Return how many trials a file has, without creating it."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return int(database.execute("SELECT count(*) FROM trials").fetchone()[0])


def _sample(trial: optuna.Trial) -> dict[str, Any]:
    trial.suggest_float("lr", 1e-3, 0.3, log=True)
    if trial.suggest_categorical("optimizer", ["sgd", "adamw"]) == "sgd":
        trial.suggest_categorical("nesterov", [False, True])
    trial.suggest_int("layers", 2, 10)
    return dict(trial.params)
