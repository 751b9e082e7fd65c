"""How much of its slots' time a search spends in training.

A slot's time runs from its first step to its last report: what the start takes is a number of its
own, and at the end of a search some slots have nothing left to do. A trial's evaluation is work
that was asked for and counts as busy; the share of the steps alone is told beside it.
"""

from pathlib import Path

from tune_mnist.benchmarks.sources import Note
from tune_mnist.errors import ConfigError
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History


def busy_shares(workers: list[list[Note]]) -> tuple[float, float]:
    """Return the share of the workers' time in training and evaluation, and in training alone."""
    slots = sum(notes[-1].ended - notes[0].began for notes in workers)
    busy = sum(note.ended - note.began for notes in workers for note in notes)
    steps = sum(note.training for notes in workers for note in notes)
    return busy / slots, steps / slots


def busy_shares_of_run(path: Path) -> tuple[float, float]:
    """Return the same for a run in its folder, as seen by its driver.

    Trials that one slot ran after another are not told apart in a run's files: slots are as many
    as trials ran at once, from the first epoch's begin to the last report.

    Raises:
        RunFolderError: it is no run's folder.
        ConfigError: it has too few epochs.
    """
    history = History.load(RunFolder.open(path))
    rows = [row for _, row in history.rows]
    if len(rows) < 2:
        raise ConfigError(f"--run: {path} has {len(rows)} epochs, too few to say how busy it was")
    training = [row.seconds for row in rows]
    evaluation = [row.evaluation_seconds for row in rows]
    ends = [row.elapsed for row in rows]
    begins = [e - t - v for e, t, v in zip(ends, training, evaluation, strict=True)]
    wall = max(ends) - min(begins)
    slots = _at_once(begins, ends)
    return (sum(training) + sum(evaluation)) / (slots * wall), sum(training) / (slots * wall)


def _at_once(begins: list[float], ends: list[float]) -> int:
    """Return how many epochs overlapped at most; ends go before begins at the same time."""
    changes = sorted([(time, -1) for time in ends] + [(time, 1) for time in begins])
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most
