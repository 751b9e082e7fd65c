"""Searches whose time and memory are measured: trials leave notes, the driver is watched.

    python -m tune_mnist.benchmarks.watched trivial NOTES --trials 100 ...

runs the search command with such trials: `trivial` ones report at once, `real` ones train. NOTES
is the folder for their notes; the other options are the search's own.

Workers import this module, so what only the driver needs is imported where it is used.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tune_mnist.errors import TuneMnistError
from tune_mnist.mnist.data import Split
from tune_mnist.mnist.metrics import EpochMetrics
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import Assignment, EpochRow, History, TrialRecord
from tune_mnist.tuning.resources import resident_megabytes
from tune_mnist.tuning.worker import EpochSource, TrialEpoch

LOOK_AT_MEMORY_EVERY = 0.5  # seconds
OUTPUT = "output"  # file: what a process prints


@dataclass(frozen=True)
class Trivial:
    """Trials that train nothing and report what a real one would, in size and in order."""

    state_size: int = 300_000  # bytes, about those of a real state
    model_size: int = 120_000
    # The first trials last until every worker has started. Tune gives a free worker to a trial
    # whose own worker is still starting, and ends that one: trials shorter than a start would
    # all run on the first worker.
    first: int = 0  # trials that wait
    wait: float = 8.0  # seconds

    def __call__(self, assignment: Assignment, split: Split) -> Iterator[TrialEpoch]:
        """Report every epoch at once; accuracies rise, and differ between trials."""
        done = int(assignment.state.split()[0]) if assignment.state else 0
        if assignment.number < self.first:
            time.sleep(self.wait)
        skill = (assignment.number * 0.6180339887) % 1  # evenly spread and in no order
        for epoch in range(done + 1, assignment.epochs + 1):
            accuracy = 0.9 + 0.05 * skill + 0.04 * epoch / assignment.epochs
            metrics = EpochMetrics(
                epoch=epoch,
                train_loss=1 - accuracy,
                val_loss=1 - accuracy,
                val_accuracy=accuracy,
                test_loss=1 - accuracy,
                test_accuracy=accuracy,
                test_correct=round(10_000 * accuracy),
                seconds=0.0,
                evaluation_seconds=0.0,
            )
            state = f"{epoch} ".encode().ljust(self.state_size, b".")
            yield TrialEpoch(metrics, state, model=partial(bytes, self.model_size))


@dataclass(frozen=True)
class Note:
    """An epoch's times in its worker, in seconds since 1970, and the worker's memory."""

    trial: int
    began: float  # the first step
    ended: float  # right before the report
    training: float  # seconds of it, without the evaluation
    resident: float  # MB, at the report
    idle: float  # MB, before the worker's first trial


@dataclass(frozen=True)
class Watched:
    """Trials of another source; each of their epochs leaves a note in a folder."""

    source: EpochSource
    folder: Path  # that workers and driver share
    loads_torch: bool = False  # before the first note: a trial's memory excludes the imports

    def __call__(self, assignment: Assignment, split: Split) -> Iterator[TrialEpoch]:
        if self.loads_torch:
            import tune_mnist.mnist.training  # noqa: F401
        idle = resident_megabytes()
        for epoch in self.source(assignment, split):
            ended = time.time()
            training = epoch.metrics.seconds
            began = ended - training - epoch.metrics.evaluation_seconds
            note = Note(assignment.number, began, ended, training, resident_megabytes(), idle)
            with (self.folder / str(os.getpid())).open("a", encoding="utf-8") as file:
                file.write(json.dumps(vars(note)) + "\n")
            yield epoch


def read_notes(folder: Path) -> list[list[Note]]:
    """Return the notes of each worker, in the order they were written."""
    return [
        [Note(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
        for path in sorted(folder.iterdir())
    ]


def watch_search(source: str, *arguments: str) -> tuple[list[list[Note]], list[float]]:
    """Run a search of `trivial` or `real` trials to its end, or raise TuneMnistError.

    Returns each worker's notes, and the driver's resident memory in MB every half second.
    """
    with tempfile.TemporaryDirectory(prefix="tune_mnist-bench-") as name:
        notes = Path(name) / "notes"
        notes.mkdir()
        megabytes: list[float] = []
        module = [__name__, source, str(notes), *arguments, *own_run(Path(name))]
        with started("a search to be measured", module, Path(name)) as process:
            while process.poll() is None:
                megabytes.append(resident_megabytes(process.pid))
                time.sleep(LOOK_AT_MEMORY_EVERY)
        return read_notes(notes), megabytes


def time_to_first_step(*arguments: str) -> float:
    """Return the seconds of a search command until its first training step.

    It is the first epoch's report less what that took; the report's way to the driver counts as
    well. Raises TuneMnistError if the search fails.
    """
    with tempfile.TemporaryDirectory(prefix="tune_mnist-bench-") as name:
        began = time.time()
        module = ["tune_mnist.search", *arguments, *own_run(Path(name))]
        with started("a search to be measured", module, Path(name)):
            pass
        record, row = epochs_of_run(Path(name))[0]
        return record.time_of(row) - row.seconds - row.evaluation_seconds - began


def own_run(folder: Path) -> list[str]:
    """Return the search command's options for a run in the folder `run` of this one."""
    return ["--results-dir", str(folder), "--run", "run", "--no-report"]


def epochs_of_run(folder: Path) -> list[tuple[TrialRecord, EpochRow]]:
    """Return the epochs of a run that `own_run` put there, as they were reported."""
    return History.load(RunFolder.open(folder / "run")).rows


@contextmanager
def started(
    name: str, module: Sequence[str], folder: Path, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module that prints into a file of the folder, and wait for its end.

    Raises TuneMnistError if it fails.
    """
    with (folder / OUTPUT).open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )
        try:
            yield process
            code = process.wait()
        finally:
            process.terminate()  # does nothing to one that has ended
            process.wait()
    if code != 0:
        raise TuneMnistError(f"{name} failed with {code}: {last_words(folder)}")


def last_words(folder: Path) -> str:
    """Return the end of what `started` has kept of a module's output."""
    return " ".join((folder / OUTPUT).read_text("utf-8", errors="replace").split())[-600:]


def main(source: str, notes: str, arguments: Sequence[str]) -> int:
    """Search as the search command would and return its exit code."""
    from tune_mnist.cli import exit_code
    from tune_mnist.tuning.launch import search
    from tune_mnist.tuning.settings import SearchSettings
    from tune_mnist.tuning.worker import train_assignment

    real = source == "real"
    trial: EpochSource = train_assignment if real else Trivial(first=os.cpu_count() or 1)
    watched = Watched(trial, Path(notes), loads_torch=real)
    return exit_code("search", SearchSettings, partial(search, epochs_of=watched), arguments)


if __name__ == "__main__":
    # Under its real name: Ray's workers cannot import what a module defines as __main__.
    from tune_mnist.benchmarks import watched

    sys.exit(watched.main(sys.argv[1], sys.argv[2], sys.argv[3:]))
