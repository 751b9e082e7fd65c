"""What a search spent: its progress against epochs and time, and where both went."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
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
    """Return every epoch that raised the search's best, in order."""
    best = BestSoFar(metric)
    return [
        Milestone(record, row, spent)
        for spent, (record, row) in enumerate(history.rows, start=1)
        if best.take(record, row)
    ]


def epochs_by_band(history: History, budget: int) -> dict[str, Counter[State]]:
    """Count the epochs between two rungs, by the final state of the trials that trained them.

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
    """Return where the workers' time went, s.

    The workers are as many as trials ever ran at once, all of them from start to end. Time that
    was neither training nor evaluation was waiting: for a trial, for a worker to start, for a
    place on a crowded machine.
    """
    rows = [row for _, row in history.rows]
    training = _total(row.seconds for row in rows)
    evaluation = _total(row.evaluation_seconds for row in rows)
    workers = most_at_once(
        (record.started, history.elapsed if record.state == "running" else record.ended)
        for record in history.trials.values()
    )
    waiting = max(workers * history.elapsed - training - evaluation, 0.0)
    return {"training": training, "evaluation": evaluation, "waiting": waiting}


def most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    """Return how many spans, each (begin, end), overlap at most.

    At equal times an end comes before a begin: what follows takes the place of what ended.
    """
    changes = [(time, step) for span in spans for time, step in zip(span, (1, -1), strict=True)]
    most = now = 0
    for _, step in sorted(changes):
        now += step
        most = max(most, now)
    return most


def _total(seconds: Iterable[float]) -> float:
    return sum(value for value in seconds if not math.isnan(value))
