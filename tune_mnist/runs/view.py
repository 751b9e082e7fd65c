"""A run as others see it: read without disturbing its writer, its state in a word."""

import fcntl
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from tune_mnist.errors import RunFolderError
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History
from tune_mnist.runs.ranking import RankedTrial, baseline_of, rank_by_best, ranked_trials
from tune_mnist.runs.space import SearchSpace

RunState = Literal["running", "finished", "out of time", "interrupted", "failed", "killed"]
_READS = 4  # of a run that is being written to: its files are not all of one instant
_BETWEEN_READS = 0.05  # seconds
_STATES: Mapping[str | None, RunState] = {  # by how the last session was closed
    None: "killed",
    "finished": "finished",
    "out of time": "out of time",
    "failed": "failed",
    "SIGHUP": "interrupted",
    "SIGINT": "interrupted",
    "SIGTERM": "interrupted",
}


@dataclass(frozen=True)
class Asked:
    """What a search was asked for, as far as its readers need it."""

    metric: Metric  # what the search selects by
    epochs: int  # the budget of a trial
    trials: int | None  # None: an older version did not say
    images: int | None  # None: all of them
    seed: int


@dataclass(frozen=True)
class RunView:
    """A run as it was found on disk."""

    folder: RunFolder
    history: History
    search: Mapping[str, Any]  # the contents of search.yaml
    asked: Asked
    state: RunState

    @classmethod
    def read(cls, path: Path) -> "RunView":
        """Read a run, which may be at work, or raise RunFolderError."""
        folder = RunFolder.open(path)
        search = folder.read_search()
        refuse_confirmation(folder, search)
        asked = read_asked(folder, search)
        # The lock is looked at first: a run that ends meanwhile was at work when it was found.
        at_work = is_at_work(folder)
        history = _read_history(folder, at_work)
        state = "running" if at_work else _STATES.get(history.closed_as, "failed")
        return cls(folder, history, search, asked, state)

    @property
    def metric(self) -> Metric:
        return self.asked.metric

    @property
    def space(self) -> SearchSpace:
        """The space that was searched; raises SearchSpaceError if it is damaged."""
        name = str(self.search.get("space_name", ""))
        return SearchSpace.from_dict(self.search.get("space"), name, str(self.folder.search))

    @cached_property
    def trials(self) -> list[RankedTrial]:
        return ranked_trials(self.history, self.metric)

    @cached_property
    def ranked(self) -> list[RankedTrial]:
        """The trials that have a best epoch, the highest score first."""
        return rank_by_best(self.trials, self.metric)

    @property
    def best(self) -> RankedTrial | None:
        return self.ranked[0] if self.ranked else None

    @property
    def baseline(self) -> RankedTrial | None:
        return baseline_of(self.trials)

    @property
    def begun(self) -> float:
        """When the first trial started, seconds since 1970; without one, search.yaml's time."""
        if self.history.trials:
            return self.history.trials[0].started_at
        try:
            return self.folder.search.stat().st_mtime
        except OSError:
            return math.nan


def read_asked(folder: RunFolder, search: Mapping[str, Any]) -> Asked:
    """Return what search.yaml says was asked, or raise RunFolderError."""
    asked = search.get("asked")
    asked = asked if isinstance(asked, Mapping) else {}
    metric: Any = asked.get("metric")
    epochs = _whole(asked, "epochs")
    if metric not in get_args(Metric) or not epochs or epochs < 1:
        raise RunFolderError(
            f"{folder.search} is damaged (asked.metric is {metric!r}, asked.epochs "
            f"{asked.get('epochs')!r}): put back a copy"
        )
    trials, images = _whole(asked, "trials"), _whole(asked, "images")
    return Asked(metric, epochs, trials, images, _whole(asked, "seed") or 0)


def _whole(asked: Mapping[str, Any], name: str) -> int | None:
    value = asked.get(name)
    return value if type(value) is int else None  # not a bool


def refuse_confirmation(folder: RunFolder, search: Mapping[str, Any]) -> None:
    """Raise RunFolderError if the folder holds a confirmation instead of a search."""
    if "confirmation" in search:
        run = folder.path.absolute().parent
        raise RunFolderError(
            f"{folder.path} is the confirmation of the search {run}: "
            f"python -m tune_mnist.confirm {run} resumes it"
        )


def is_at_work(folder: RunFolder) -> bool:
    """Return True if a process holds the right to write to the run; False also if unknown."""
    try:
        with (folder.path / ".lock").open("rb") as lock:
            # A shared lock, so that two readers at once do not take each other for a search.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def find_runs(results: Path) -> tuple[list[RunView], list[RunFolderError]]:
    """Return the runs in a folder of results, newest first, and why others cannot be read."""
    found, errors = [], []
    for search in sorted(results.glob("*/search.yaml")):
        try:
            found.append(RunView.read(search.parent))
        except RunFolderError as error:
            errors.append(error)
    return sorted(found, key=lambda run: -run.begun), errors


def _read_history(folder: RunFolder, at_work: bool) -> History:
    """Read events and epochs; of a run at work, again if rows are newer than the events."""
    for _ in range(_READS - 1 if at_work else 0):
        try:
            return History.load(folder)
        except RunFolderError:
            time.sleep(_BETWEEN_READS)
    return History.load(folder)
