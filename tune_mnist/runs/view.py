"""Runs as others see them: read without disturbing their writer, with their state in a word."""

import fcntl
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tune_mnist.errors import RunFolderError
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History
from tune_mnist.runs.ranking import RankedTrial, rank_by_best, standings

RunState = Literal["running", "finished", "out of time", "interrupted", "failed", "killed"]
_READS = 4  # of a run that is being written to: its files are not all of one instant
_BETWEEN_READS = 0.05  # seconds
_ENDINGS: Mapping[str, RunState] = {
    "finished": "finished",
    "out of time": "out of time",
    "failed": "failed",
    "SIGINT": "interrupted",
    "SIGTERM": "interrupted",
}


@dataclass(frozen=True)
class RunView:
    """A run as it was found on disk."""

    folder: RunFolder
    history: History
    search: Mapping[str, Any]  # the contents of search.yaml
    metric: Metric  # what the search selects by
    epochs: int  # the budget of a trial
    state: RunState

    @classmethod
    def read(cls, path: Path) -> "RunView":
        """Read a run, which may be at work.

        Raises:
            RunFolderError: there is none, or it is damaged.
        """
        folder = RunFolder.open(path)
        search = folder.read_search()
        refuse_confirmation(folder, search)
        try:
            metric, epochs = search["asked"]["metric"], int(search["asked"]["epochs"])
            if metric not in get_args(Metric) or epochs < 1:
                raise ValueError(f"metric {metric!r}, {epochs} epochs")
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(
                f"{folder.search} is damaged ({type(error).__name__}: {error}): put back a copy"
            ) from error
        # Asked first: a run that ends while it is read was at work when it was looked at.
        at_work = is_at_work(folder)
        history = _read_history(folder, at_work)
        state: RunState = "running" if at_work else _state(history)
        return cls(folder, history, search, metric, epochs, state)

    @property
    def asked(self) -> Mapping[str, Any]:
        """What the search was asked for."""
        asked: Mapping[str, Any] = self.search["asked"]
        return asked

    @property
    def standings(self) -> list[RankedTrial]:
        """All trials in the order of their start."""
        return standings(self.history, self.metric)

    @property
    def ranked(self) -> list[RankedTrial]:
        """The trials that have an epoch to be judged by, the best first."""
        return rank_by_best(self.standings, self.metric)

    @property
    def baseline(self) -> RankedTrial | None:
        """The trial that all others are compared with."""
        return next((each for each in self.standings if each.is_baseline), None)

    @property
    def begun(self) -> float:
        """When the first trial started, seconds since 1970; of none, when search.yaml was made."""
        if self.history.trials:
            return self.history.trials[0].started_at
        try:
            return self.folder.search.stat().st_mtime
        except OSError:
            return math.nan


def refuse_confirmation(folder: RunFolder, search: Mapping[str, Any]) -> None:
    """See that a folder is a search's, and not that of the confirmation within it.

    Raises:
        RunFolderError: it is the other.
    """
    if "confirmation" in search:
        run = folder.path.absolute().parent
        raise RunFolderError(
            f"{folder.path} is the confirmation of a search, which is {run}: "
            f"python -m tune_mnist.confirm {run} goes on with it"
        )


def is_at_work(folder: RunFolder) -> bool:
    """Say whether a process holds the right to write to the run; unknown counts as no."""
    try:
        lock = os.open(folder.path / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared, so that two who look at once do not take each other for a search.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
    return False


def find_runs(results: Path) -> tuple[list[RunView], list[RunFolderError]]:
    """Return the runs in a folder of results, the newest first, and why others cannot be read."""
    found: list[RunView] = []
    errors: list[RunFolderError] = []
    for search in sorted(results.glob("*/search.yaml")):
        try:
            found.append(RunView.read(search.parent))
        except RunFolderError as error:
            errors.append(error)
    return sorted(found, key=lambda run: -run.begun), errors


def _state(history: History) -> RunState:
    if history.closed_as is None:
        return "killed"
    return _ENDINGS.get(history.closed_as, "failed")


def _read_history(folder: RunFolder, at_work: bool) -> History:
    """Read events and epochs; where rows are newer than the events, read again."""
    for _ in range(_READS - 1 if at_work else 0):
        try:
            return History.load(folder)
        except RunFolderError:
            time.sleep(_BETWEEN_READS)
    return History.load(folder)
