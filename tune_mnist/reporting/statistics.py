"""What a search spent: its progress against epochs and time, and where both went."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.history import EpochRow, History, State, TrialRecord
from tune_mnist.runs.ranking import BestSoFar


@dataclass(frozen=True)
class Milestone:
    """An epoch that was better than all before it."""

    record: TrialRecord
    row: EpochRow
    epochs: int  # trained in the whole search until then, this one included


def milestones(history: History, metric: Metric) -> list[Milestone]:
    """Return every epoch with which the search's best became better, in order."""
    best = BestSoFar(metric)
    return [
        Milestone(record, row, spent)
        for spent, (record, row) in enumerate(history.rows, start=1)
        if best.take(record, row)
    ]


def epochs_by_band(history: History, budget: int) -> dict[str, Counter[State]]:
    """Count the epochs between two rungs, by what became of the trials that trained them.

    A rung is an epoch at which a trial was stopped.
    """
    trials = history.trials.values()
    rungs = {each.epochs for each in trials if each.state == "stopped" and each.epochs}
    longest = max([budget, *(each.epochs for each in trials)])
    edges = [0, *sorted(rungs - {longest}), longest]
    bands = [f"{low + 1}-{high}" if high > low + 1 else f"{high}" for low, high in pairwise(edges)]
    found: dict[str, Counter[State]] = {band: Counter() for band in bands}
    for record in trials:
        for epoch in range(1, record.epochs + 1):
            found[bands[bisect_left(edges, epoch) - 1]][record.state] += 1
    return found


def worker_seconds(history: History) -> dict[str, float]:
    """Return what the workers' time went to, s.

    As many workers as ever had a trial at once are taken to have been there all the time; what
    was neither training nor evaluation was waiting: for a trial, for a worker to start, for a
    place on a crowded machine.
    """
    rows = [row for _, row in history.rows]
    training = sum(_finite(row.seconds) for row in rows)
    evaluation = sum(_finite(row.evaluation_seconds) for row in rows)
    whole = _most_at_once(history) * history.elapsed
    return {
        "training": training,
        "evaluation": evaluation,
        "waiting": max(whole - training - evaluation, 0.0),
    }


def _most_at_once(history: History) -> int:
    changes: list[tuple[float, int]] = []
    for record in history.trials.values():
        ended = record.ended if record.state != "running" else history.elapsed
        # Of equals the end comes first: the next trial takes the place of the one before.
        changes += [(record.started, 1), (ended, -1)]
    most = now = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def _finite(value: float) -> float:
    return value if value == value else 0.0
