"""What trials do in a benchmark: nothing at all, or the real training, watched from outside."""

import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from tune_mnist.mnist.data import Split
from tune_mnist.mnist.metrics import EpochMetrics
from tune_mnist.runs.history import Assignment
from tune_mnist.tuning.worker import EpochSource, TrialEpoch


@dataclass(frozen=True)
class Trivial:
    """Trials that train nothing and report what a real one would, in size and in order."""

    state_size: int = 300_000  # bytes, about what a real state takes
    model_size: int = 120_000
    # The first trials last until every worker has started. Tune gives a worker that is free to a
    # trial whose own worker is still starting, and ends that one: trials shorter than a start
    # would all run on the first worker.
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
            yield TrialEpoch(
                metrics=EpochMetrics(
                    epoch=epoch,
                    train_loss=1 - accuracy,
                    val_loss=1 - accuracy,
                    val_accuracy=accuracy,
                    test_loss=1 - accuracy,
                    test_accuracy=accuracy,
                    test_correct=round(10_000 * accuracy),
                    seconds=0.0,
                    evaluation_seconds=0.0,
                ),
                state=f"{epoch} ".encode().ljust(self.state_size, b"."),
                model=partial(bytes, self.model_size),
            )


@dataclass(frozen=True)
class Note:
    """When an epoch took place in a worker, in seconds since 1970, and what the worker held."""

    process: int
    trial: int
    epoch: int
    began: float  # the first step
    ended: float  # right before the report
    training: float  # seconds of it, without the evaluation
    resident: float  # MB, at the report
    idle: float  # MB, before the worker's first trial

    def line(self) -> str:
        """Return the note as a line of text."""
        return ",".join(repr(value) for value in vars(self).values())

    @classmethod
    def parse(cls, line: str) -> "Note":
        """Read a line that `line` wrote."""
        process, trial, epoch, *numbers = line.split(",")
        return cls(int(process), int(trial), int(epoch), *map(float, numbers))


@dataclass(frozen=True)
class Watched:
    """Trials of another source, each of whose epochs leaves a note in a folder."""

    source: EpochSource
    folder: Path  # that workers and driver share
    loads_torch: bool = False  # before the first note, as the imports are none of a trial's

    def __call__(self, assignment: Assignment, split: Split) -> Iterator[TrialEpoch]:
        """Report what the source does."""
        if self.loads_torch:
            import tune_mnist.mnist.training  # noqa: F401
        idle = resident_megabytes()
        for epoch in self.source(assignment, split):
            ended = time.time()
            metrics = epoch.metrics
            note = Note(
                process=os.getpid(),
                trial=assignment.number,
                epoch=metrics.epoch,
                began=ended - metrics.seconds - metrics.evaluation_seconds,
                ended=ended,
                training=metrics.seconds,
                resident=resident_megabytes(),
                idle=idle,
            )
            with (self.folder / str(note.process)).open("a", encoding="utf-8") as file:
                file.write(note.line() + "\n")
            yield epoch


def read_notes(folder: Path) -> list[list[Note]]:
    """Return the notes of each worker, in the order of their making."""
    workers = []
    for path in sorted(folder.iterdir()):
        workers.append([Note.parse(line) for line in path.read_text("utf-8").splitlines()])
    return workers


def turnarounds(workers: list[list[Note]]) -> list[float]:
    """Return the seconds from a trial's last report to the next one's first step, by worker."""
    return [
        after.began - before.ended
        for notes in workers
        for before, after in pairwise(notes)
        if before.trial != after.trial
    ]


def resident_megabytes(process: int | str = "self") -> float:
    """Return the memory that a process has resident, or our own peak where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return pages * resource.getpagesize() / 1e6
