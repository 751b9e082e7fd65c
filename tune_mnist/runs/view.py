"""A run as others see it: read without disturbing its writer, its state in a word."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from tune_mnist.errors import RunFolderError
from tune_mnist.mnist.config import MAX_EPOCHS, Limits, Precision
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.files import Count, Seconds, record_of
from tune_mnist.runs.folder import RunFolder, damaged
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


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a search was asked, as `asked` in search.yaml says; older versions wrote less."""

    metric: Metric  # what the search selects by
    trials: Count | None = None
    epochs: Annotated[int, Limits(">= 1", f"<= {MAX_EPOCHS}")]  # the budget of a trial
    time_budget: Seconds | None = None
    images: Count | None = None  # None: all of them
    grace_epochs: Count | None = None
    reduction_factor: float | None = None
    startup_trials: Count | None = None
    no_start: bool = False
    seed: Annotated[int, Limits(">= 0", f"<= {2**128}")] | None = None


@dataclass(frozen=True, kw_only=True)
class SearchFile:
    """The content of a search's search.yaml."""

    asked: Asked
    space: object = None  # see `RunView.space`
    space_name: str = ""
    space_source: str = ""  # the file's path when the search was started
    storage: str | None = None  # the URI of the folder that holds a copy of the run
    confirm: bool = False  # whether the winners are confirmed at the end
    precision: Precision = "float32"
    versions: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class RunView:
    """A run as it was found on disk."""

    folder: RunFolder
    history: History
    search: SearchFile
    state: RunState

    @classmethod
    def read(cls, path: Path) -> "RunView":
        """Read a run, which may be at work, or raise RunFolderError."""
        folder = RunFolder.open(path)
        search = read_search(folder)
        # The lock is looked at first: a run that ends meanwhile was at work when it was found.
        at_work = folder.is_at_work
        history = _read_history(folder, at_work)
        state = "running" if at_work else _STATES.get(history.closed_as, "failed")
        return cls(folder, history, search, state)

    @property
    def asked(self) -> Asked:
        return self.search.asked

    @property
    def metric(self) -> Metric:
        return self.asked.metric

    @property
    def space(self) -> SearchSpace:
        """The space that was searched; raises SearchSpaceError if it is damaged."""
        source = str(self.folder.search)
        return SearchSpace.from_dict(self.search.space, self.search.space_name, source)

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


def read_search(folder: RunFolder) -> SearchFile:
    """Return what search.yaml says, or raise RunFolderError; the space is not looked at."""
    content = folder.read_search()
    if "confirmation" in content:
        run = folder.path.absolute().parent
        raise RunFolderError(
            f"{folder.path} is the confirmation of the search {run}: "
            f"python -m tune_mnist.confirm {run} resumes it"
        )
    try:
        return record_of(SearchFile, content)
    except ValueError as error:
        raise damaged(folder.search, error) from error


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
