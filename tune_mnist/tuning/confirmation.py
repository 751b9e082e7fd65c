"""What a confirmation trains: a search's winners and its baseline, on all images and fresh seeds.

A confirmation is a search whose trials are fixed beforehand and that stops none of them early.
In a folder of its own, `confirm` within the run's, it runs, resumes and retries as a search does.
"""

import contextlib
import math
import time
from dataclasses import dataclass, replace
from itertools import count as count_up
from itertools import islice, product
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.confirmed import AskedConfirmation, Candidate, confirmed_table
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.formatting import count, duration, short_path
from tune_mnist.runs.history import History, TrialRecord
from tune_mnist.runs.space import SearchSpace
from tune_mnist.runs.view import RunView
from tune_mnist.tuning.experiment import Rules
from tune_mnist.tuning.plan import machine, versions
from tune_mnist.tuning.settings import ConfirmOptions


class NothingToConfirmError(ConfigError):
    """No trial of a search but the baseline has finished an epoch."""


@dataclass(frozen=True)
class Confirmation:
    """The configurations and seeds that a confirmation trains."""

    candidates: tuple[Candidate, ...]  # the baseline first
    seeds: tuple[int, ...]
    space: SearchSpace  # the search's
    picked_by: Metric  # the search
    baseline_has_begun: bool  # in the search
    epochs: int
    images: int | None  # training images; None: all there are
    time_budget: float | None  # s, over all sessions

    @classmethod
    def of(cls, run: RunView, options: ConfirmOptions) -> Self:
        """Choose what to train again of a search, or raise NothingToConfirmError."""
        ranks = {each.record.number: rank for rank, each in enumerate(run.ranked, start=1)}
        winners = [each.record for each in run.ranked if not each.is_baseline][: options.top]
        if not winners:
            raise NothingToConfirmError(
                f"{run.folder.path} has nothing to confirm: no trial but the baseline has "
                "finished an epoch"
            )
        # One that has not begun is trained all the same, as the trial that it is to be.
        number, config = max(len(run.space.start), len(run.trials)), run.space.baseline()
        if run.baseline:
            number, config = run.baseline.record.number, run.baseline.record.config
        candidates = [Candidate("baseline", number, ranks.get(number, 0), config)]
        candidates += [
            Candidate(f"trial {each.number}", each.number, ranks[each.number], each.config)
            for each in winners
        ]
        return cls(
            candidates=tuple(candidates),
            seeds=_fresh_seeds(run, options.seeds),
            space=run.space,
            picked_by=run.metric,
            baseline_has_begun=run.baseline is not None,
            epochs=options.epochs or run.asked.epochs,
            images=options.images,
            time_budget=options.time_budget,
        )

    @property
    def rules(self) -> Rules:
        # All candidates with one seed come before any with the next. So an interrupted
        # confirmation compares like with like, and more seeds come last.
        pairs = product(self.seeds, enumerate(self.candidates))
        trials = [
            TrialRecord(number, candidate.config, seed, "start" if position else "baseline")
            for number, (seed, (position, candidate)) in enumerate(pairs)
        ]
        return Rules(
            space=self.space,
            metric="test_accuracy",
            trials=len(trials),
            epochs=self.epochs,
            time_budget=self.time_budget,
            images=self.images,
            grace_epochs=self.epochs,  # none is stopped early
            fixed_trials=trials,
        )

    @property
    def asked(self) -> AskedConfirmation:
        return AskedConfirmation(self.epochs, self.images, self.seeds, self.candidates)

    def save(self, folder: RunFolder, run: str, before: AskedConfirmation | None) -> None:
        """Write the confirmation's search.yaml, with all seeds that were ever asked for."""
        seeds = max(self.seeds, before.seeds if before else (), key=len)
        asked = {**vars(self.asked), "seeds": list(seeds)}
        asked["configurations"] = [
            {**vars(each), "config": each.config.as_dict()} for each in self.candidates
        ]
        around = {"of": run, "versions": versions(), "machine": machine()}
        folder.write_search({"confirmation": asked, **around})

    def continuing(self, before: AskedConfirmation) -> Self:
        """Return this one with the winners in an earlier one's order, where they are the same.

        A training's number says which winner it is of; as a search goes on, their ranks change.
        """
        mine = {each.trial: each for each in self.candidates}
        order = [each.trial for each in before.configurations]
        if len(order) != len(mine) or not all(trial in order for trial in mine):
            return self
        return replace(self, candidates=tuple(mine[trial] for trial in order))

    def differences(self, before: AskedConfirmation | None) -> list[str]:
        """Return in what an earlier confirmation is neither a part of this one nor contains it."""
        if before is None:
            return ["settings"]
        found = [
            name for name in ("epochs", "images") if getattr(self, name) != getattr(before, name)
        ]
        if before.seeds[: len(self.seeds)] != self.seeds[: len(before.seeds)]:
            found.append("seeds")
        if len(before.configurations) != len(self.candidates):
            return [*found, "configurations"]
        trained = [(each.trial, each.config) for each in before.configurations]
        same = trained == [(each.trial, each.config) for each in self.candidates]
        return found if same else [*found, "winners"]

    def start_line(self, folder: RunFolder, history: History, images: int, at_once: int) -> str:
        done = len(history.trials) - len(history.unfinished())
        so_far = f", {done:,} of them done in {duration(history.elapsed)}" if done else ""
        return (
            f"{short_path(folder.path)}: the baseline"
            f"{'' if self.baseline_has_begun else ', which the search has not begun,'} and "
            f"{count(len(self.candidates) - 1, 'winner')} on "
            f"{count(len(self.seeds), 'fresh seed')}, {self.rules.trials:,} trainings of "
            f"{count(self.epochs, 'epoch')}{so_far}, {at_once} at a time, "
            f"{count(images, 'training image')}, none held out, "
            + ("nothing" if self.picked_by == "val_accuracy" else "winners")
            + " picked by test images"
        )

    def table(self, history: History, images: int) -> pd.DataFrame | None:
        """Return the content of confirmed.csv; None while no training has finished."""
        ended = [record for record in history.trials.values() if record.state != "running"]
        if not any(record.state == "complete" for record in ended):
            return None
        width = len(self.candidates)
        by_candidate = [
            [record for record in ended if record.number % width == position]
            for position in range(width)
        ]
        baseline, *others = zip(self.candidates, by_candidate, strict=True)
        others.sort(key=lambda each: each[0].rank or math.inf)
        candidates, records = zip(baseline, *others, strict=True)
        return confirmed_table(candidates, records, epochs=self.epochs, images=images)


def keep_aside(run: RunFolder) -> Path:
    """Move a run's confirmation and its table to a folder beside it, and return that folder."""
    with contextlib.suppress(FileNotFoundError):
        run.confirmed.replace(run.confirmation.confirmed)
    return run.confirmation.path.rename(run.path / time.strftime("confirm-replaced-%Y%m%d-%H%M%S"))


def _fresh_seeds(run: RunView, wanted: int) -> tuple[int, ...]:
    """Return seeds that depend on the search's seed alone, and that none of its trials had."""
    used = {record.seed for record in run.history.trials.values()}
    # Trials draw theirs with a 1 at the end.
    streams = (np.random.SeedSequence([run.asked.seed or 0, stream, 2]) for stream in count_up())
    drawn = (int(stream.generate_state(1)[0]) for stream in streams)
    return tuple(islice((seed for seed in drawn if seed not in used), wanted))
