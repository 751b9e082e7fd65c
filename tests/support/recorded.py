"""Searches that never ran: histories written down epoch by epoch through their real interface."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

from support.course import new_rules
from support.epochs import epoch_row
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History, Origin, State, TrialRecord
from tune_mnist.runs.ranking import BestSoFar
from tune_mnist.tuning.live_view import Tally


class RecordedSearch:
    """A run's folder with a history that a test fills, trial by trial."""

    def __init__(self, path: Path, name: str = "search") -> None:
        self.folder = RunFolder.create(path / name)
        self.history = History(self.folder)
        self.history.open_session({})
        self.clock = 0.0

    def start(self, origin: Origin | None = None, **config: Any) -> int:
        """Start a trial, the first one as the baseline, and return its number."""
        number = len(self.history.trials)
        record = TrialRecord(
            number=number,
            config=TrainConfig.from_mapping(config),
            seed=1000 + number,
            origin=origin or ("sampled" if number else "baseline"),
            ray_id=f"{number:08d}",
        )
        self.clock += 1
        self.history.start_trial(record, self.clock)
        return number

    def epoch(self, trial: int, val: float, test: float | None = None, **values: Any) -> None:
        """Add a trial's next epoch; 2 s of training and 0.5 s of evaluation unless told."""
        self.clock += 2.5
        epoch = self.history.trials[trial].epochs + 1
        self.history.add_epoch(epoch_row(trial, epoch, val, test, elapsed=self.clock, **values))

    def diverged_epoch(self, trial: int, step: int = 33) -> None:
        """Add an epoch whose loss was not finite: it was not evaluated."""
        self.epoch(trial, math.nan, evaluation_seconds=0.0, diverged_step=step)

    def end(self, trial: int, state: State, reason: str = "") -> None:
        self.clock += 0.5
        self.history.end_trial(trial, self.clock, state, reason)

    def trial(
        self,
        val: Sequence[float],
        test: Sequence[float] | None = None,
        state: State = "complete",
        reason: str = "",
        **config: Any,
    ) -> int:
        """Add a whole trial with these accuracies and return its number."""
        number = self.start(**config)
        for position, accuracy in enumerate(val):
            self.epoch(number, accuracy, test[position] if test else None)
        self.end(number, state, reason)
        return number


class Driven(SimpleNamespace):
    """What a display sees of a recorded search's driver; every unfinished trial is running."""

    @property
    def running(self) -> Any:
        return self.history.unfinished()


def tally_of(search: RecordedSearch, elapsed: float = 0.0, **rules: Any) -> Tally:
    """Count a recorded search as one that goes by these rules."""
    asked = new_rules(**{"trials": 50, "epochs": 20, **rules})
    best = BestSoFar(asked.metric)
    for record, row in search.history.rows:
        best.take(record, row)
    driven: Any = Driven(rules=asked, history=search.history, best=best, elapsed=elapsed)
    return Tally(driven)


def read_table(path: Path) -> pd.DataFrame:
    """Read trials.csv or best.csv; whole numbers stay whole where cells are empty."""
    return pd.read_csv(path, dtype={"ray_id": str}).convert_dtypes()
