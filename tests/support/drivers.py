"""Searches with scripted trials, each in a process of its own that a test can watch and kill.

The processes fork from one that has imported everything, so they start in a fraction of a second.
"""

import csv
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial

from support.scripted import Script
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History
from tune_mnist.tuning.worker import EpochSource

PATIENCE = 240.0  # seconds that anything may take

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *("tune_mnist.search", "support.scripted_search"),
        # What a search, or Tune in it, imports only on its way: seconds in each process.
        *("alembic.command", "optuna.storages._rdb.storage", "ray.air.integrations.mlflow"),
        *("ray.dag", "scipy.stats", "tensorboard.plugins.hparams.summary_v2"),
        *("tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.event_file_writer"),
    ]
)


def fork(target: Callable[..., None], *arguments: object) -> Any:
    """Begin a process that has imported everything; it may be killed and joined."""
    # Not a daemon: those must not have children, and Ray is one.
    process = _context.Process(target=target, args=arguments)
    process.start()
    return process


def wait_for(process: Any, holds: Callable[[], bool], output: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if not process.is_alive() or time.monotonic() > deadline:
            if holds():
                return
            text = output.read_text() if output.exists() else ""
            process.kill()
            pytest.fail(f"ended or slow before its time; it printed:\n{text}")
        time.sleep(0.002)


class Driver:
    def __init__(
        self,
        output: Path,
        *arguments: object,
        script: EpochSource | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._output = output
        script = script or Script(seconds=0.005)
        self._process = fork(_search, output, [str(each) for each in arguments], script, prepare)

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    @property
    def is_alive(self) -> bool:
        return bool(self._process.is_alive())

    def send(self, number: signal.Signals) -> None:
        if self._process.pid is not None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self._process.kill()
        self._process.join(PATIENCE)

    def wait(self, patience: float = PATIENCE) -> int:
        """Return its exit code once it has ended."""
        self._process.join(patience)
        code: int | None = self._process.exitcode
        if code is None:
            self.kill()
            pytest.fail(f"still running after {patience:g} s; it printed:\n{self.output}")
        return code

    def wait_until(self, holds: Callable[[], bool]) -> None:
        wait_for(self._process, holds, self._output)


class Searches:
    def __init__(self, path: Path, address: str | None) -> None:
        self.path, self._address = path, address
        self._drivers: list[Driver] = []

    @property
    def notes(self) -> Path:
        folder = self.path / "notes"
        folder.mkdir(exist_ok=True)
        return folder

    def folder(self, run: str) -> Path:
        return self.path / run

    def start(
        self, run: str, *arguments: object, space: object = "sgd", **settings: Any
    ) -> Driver:
        """Begin a new run, on few images: nobody looks at them."""
        return self._begin(
            *("--run", run, "--results-dir", self.path, "--space", space, "--images", 1000),
            *arguments,
            **settings,
        )

    def resume(self, run: str, *arguments: object, **settings: Any) -> Driver:
        return self._begin("--resume", self.folder(run), *arguments, **settings)

    def resume_at(self, uri: str, machine: str, *arguments: object, **settings: Any) -> Driver:
        """Begin to resume a copy, into a results folder as on another machine."""
        place = ("--resume", uri, "--results-dir", self.path / machine)
        return self._begin(*place, *arguments, **settings)

    def close(self) -> None:
        for driver in self._drivers:
            driver.kill()

    def _begin(self, *arguments: object, **settings: Any) -> Driver:
        where = () if self._address is None else ("--address", self._address)
        if "--report" not in arguments:  # it takes seconds
            arguments = (*arguments, "--no-report")
        output = self.path / f"output-{len(self._drivers)}.txt"
        driver = Driver(output, *arguments, *where, **settings)
        self._drivers.append(driver)
        return driver


@contextmanager
def searches_in(path: Path, address: str | None) -> Iterator[Searches]:
    searches = Searches(path, address)
    try:
        yield searches
    finally:
        searches.close()


def history_of(path: Path) -> History:
    return History.load(RunFolder.open(path))


def outcome_of(path: Path) -> list[tuple[str, list[float]]]:
    return outcome(history_of(path))


def outcome(history: History) -> list[tuple[str, list[float]]]:
    """Return all trials of a run, by number: what they trained and what they reported."""
    return [
        (repr((each.config, each.seed, each.state)), [row.val_accuracy for row in each.rows])
        for each in history.trials.values()
    ]


def epochs_in(path: Path) -> int:
    """Count the finished rows of epochs.csv, the header not among them."""
    file = path / "epochs.csv"
    return max(0, file.read_bytes().count(b"\n") - 1) if file.exists() else 0


def notes_of(notes: Path) -> Counter[str]:
    """Count how often each epoch of each trial was trained to its end, as 'trial epoch'."""
    file = notes / "epochs"
    return Counter(file.read_text().splitlines()) if file.exists() else Counter()


def study_of(folder: Path) -> list[FrozenTrial]:
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'study.db'}")
    return study.get_trials()


def table_of(folder: Path) -> dict[int, dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return {int(row["trial"]): row for row in csv.DictReader(file)}


def replace(owner: object, name: str, replacement: Any) -> Any:
    """Replace an attribute for as long as this process lives, and return the original."""
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    return original


def act_at(
    owner: type, method: str, call: int, act: Callable[[], object], *, after: bool = False
) -> None:
    """Act once, before or after a method is called for this many times, in this process."""
    calls = itertools.count(1)

    def acting(*args: Any, **kwargs: Any) -> Any:
        is_now = next(calls) == call
        if is_now and not after:
            act()
        result = original(*args, **kwargs)
        if is_now and after:
            act()
        return result

    original = replace(owner, method, acting)


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def _search(
    output: Path, arguments: list[str], script: EpochSource, prepare: Callable[[], None] | None
) -> None:
    from support.scripted_search import scripted_search
    from tune_mnist.cli import run
    from tune_mnist.tuning.settings import SearchSettings

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if prepare is not None:
        prepare()
    sys.argv[1:] = arguments
    run("search", SearchSettings, partial(scripted_search, script=script))
