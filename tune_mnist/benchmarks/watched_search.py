"""Run the search command with trials that leave notes, in a process of its own.

    python -m tune_mnist.benchmarks.watched_search trivial NOTES --trials 100 ...

The first argument is what a trial does (`trivial` or `real`), the second the folder for the notes,
the others are the search's own.
"""

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

from tune_mnist.benchmarks.sources import Note, Trivial, Watched, read_notes, resident_megabytes
from tune_mnist.errors import TuneMnistError

LOOK_EVERY = 0.005  # seconds
LOOK_AT_MEMORY_EVERY = 0.5  # seconds


@dataclass(frozen=True)
class Observation:
    """What was seen of a search."""

    began: float  # seconds since 1970, when its command was given
    seconds: float  # the whole command
    workers: list[list[Note]]  # by worker, in order
    driver_megabytes: list[float]  # resident, as time went by

    @property
    def notes(self) -> list[Note]:
        """The notes of all workers, by the time of their reports."""
        return sorted((note for notes in self.workers for note in notes), key=lambda n: n.ended)


def watch_search(source: str, arguments: Sequence[str]) -> Observation:
    """Run a search whose trials are `trivial` or `real` to its end.

    Raises:
        TuneMnistError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="tune_mnist-bench-") as name:
        folder = Path(name)
        notes = folder / "notes"
        notes.mkdir()
        module = ["tune_mnist.benchmarks.watched_search", source, str(notes)]
        megabytes: list[float] = []
        began = time.time()
        with started([*module, *arguments], folder) as process:
            while process.poll() is None:
                megabytes.append(resident_megabytes(process.pid))
                time.sleep(LOOK_AT_MEMORY_EVERY)
        return Observation(began, time.time() - began, read_notes(notes), megabytes)


def time_to_first_step(arguments: Sequence[str]) -> float:
    """Give the real search command and return the seconds until its first training step.

    The first line of epochs.csv says how long its epoch took, and the file's time when that was
    over; what a report takes on its way counts with it.

    Raises:
        TuneMnistError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="tune_mnist-bench-") as name:
        folder = Path(name)
        epochs = folder / "run" / "epochs.csv"
        began = time.time()
        with started(["tune_mnist.search", *arguments], folder) as process:
            while (lines := _lines(epochs)) < 2 and process.poll() is None:
                time.sleep(LOOK_EVERY)
            written = epochs.stat().st_mtime if lines >= 2 else 0.0
        header, first = epochs.read_text("utf-8").splitlines()[:2]
        row = dict(zip(header.split(","), first.split(","), strict=True))
        return written - float(row["seconds"]) - float(row["evaluation_seconds"]) - began


@contextmanager
def started(module: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module that searches, its run in the folder `run`, and wait for its end.

    Raises:
        TuneMnistError: it failed.
    """
    output = folder / "output"
    where = ["--results-dir", str(folder), "--run", "run", "--no-report"]
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *module, *where], stdout=file, stderr=subprocess.STDOUT
        )
        try:
            yield process
            code = process.wait()
        finally:
            process.terminate()  # does nothing to one that has ended
            process.wait()
    if code != 0:
        said = " ".join(output.read_text("utf-8", errors="replace").split())[-500:]
        raise TuneMnistError(f"a search that was to be measured failed with {code}: {said}")


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def main(source: str, notes: str, arguments: Sequence[str]) -> int:
    """Search as the search command would and return its exit code."""
    from tune_mnist.cli import exit_code
    from tune_mnist.tuning.launch import search
    from tune_mnist.tuning.settings import SearchSettings
    from tune_mnist.tuning.worker import EpochSource, train_assignment

    trial: EpochSource = (
        train_assignment if source == "real" else Trivial(first=os.cpu_count() or 1)
    )
    watched = Watched(trial, Path(notes), loads_torch=source == "real")
    return exit_code("search", SearchSettings, partial(search, epochs_of=watched), arguments)


if __name__ == "__main__":
    # Under its real name: Ray's workers know no functions of a module that runs as __main__.
    from tune_mnist.benchmarks.watched_search import main as named_main

    sys.exit(named_main(sys.argv[1], sys.argv[2], sys.argv[3:]))
