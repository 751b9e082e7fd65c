"""What a report finds in a run: what the search spent, what its best model gets wrong."""

import base64
import io
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tune_mnist.mnist.data import read_test_set
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.files import read_plain
from tune_mnist.runs.folder import RunFolder
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
    training = float(np.nansum([row.seconds for row in rows]))
    evaluation = float(np.nansum([row.evaluation_seconds for row in rows]))
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
    return max(accumulate((step for _, step in sorted(changes)), initial=0))


@dataclass(frozen=True)
class Mistake:
    """A digit that the model read wrongly."""

    index: int  # in the test set
    label: int
    guess: int
    confidence: float  # the probability that the model gave its guess
    image: npt.NDArray[np.uint8]  # [28, 28]

    def png(self) -> str:
        """Return the digit, dark on light, as a data URI."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(255 - self.image).save(buffer, "png", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Mistakes:
    """How a model reads the test set."""

    confusion: npt.NDArray[np.int64]  # [label, guess]: images
    wrong: list[Mistake]  # the most confident first
    facts: Mapping[str, Any]  # of the model: its trial, its epoch, ...


def find_mistakes(folder: RunFolder, data_dir: Path | None = None) -> Mistakes:
    """Read the test set with a run's best model, or raise TuneMnistError if one is missing."""
    images, labels = read_test_set(data_dir)
    # Here, because torch takes seconds to import and a report can do without.
    import torch

    from tune_mnist.mnist.checkpoint import load_model
    from tune_mnist.mnist.forward import evaluation_forward
    from tune_mnist.mnist.images import normalised, scaled

    model = load_model(folder.best_model, read_plain)
    pixels = normalised(scaled(torch.from_numpy(images.copy())))
    probabilities = np.asarray(evaluation_forward(model.net, pixels).exp())
    guesses = probabilities.argmax(axis=1)
    confusion = np.zeros((10, 10), dtype=np.int64)
    np.add.at(confusion, (labels, guesses), 1)
    wrong = [
        Mistake(i, int(labels[i]), int(guesses[i]), float(probabilities[i].max()), images[i])
        for i in map(int, np.flatnonzero(guesses != labels))
    ]
    wrong.sort(key=lambda mistake: -mistake.confidence)
    return Mistakes(confusion, wrong, model.facts)
