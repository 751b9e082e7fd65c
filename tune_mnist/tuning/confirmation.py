"""What a confirmation trains: a search's winners and its baseline, on all images and fresh seeds.

A confirmation is a search whose trials are fixed beforehand and that stops none of them early.
In a folder of its own, `confirm` within the run's, it runs, resumes and retries as a search does.
"""

from dataclasses import dataclass
from itertools import count as count_up
from itertools import islice, product
from typing import Self

import numpy as np
import pandas as pd

from tune_mnist.errors import ConfigError, RunFolderError
from tune_mnist.runs.confirmed import AskedConfirmation, Candidate, confirmed_table, read_asked
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.formatting import count, duration, short_path
from tune_mnist.runs.history import History, TrialRecord
from tune_mnist.runs.space import SearchSpace
from tune_mnist.runs.view import RunView
from tune_mnist.tuning.experiment import Rules
from tune_mnist.tuning.plan import machine, versions
from tune_mnist.tuning.settings import ConfirmOptions


@dataclass(frozen=True)
class Confirmation:
    """The configurations and seeds that a confirmation trains."""

    candidates: tuple[Candidate, ...]  # the baseline first
    seeds: tuple[int, ...]
    space: SearchSpace  # the search's
    epochs: int
    images: int | None  # training images; None: all there are
    time_budget: float | None  # s, over all sessions

    @classmethod
    def of(cls, run: RunView, options: ConfirmOptions) -> Self:
        """Choose what to train again of a search, or raise ConfigError if there is nothing yet."""
        ranks = {each.record.number: rank for rank, each in enumerate(run.ranked, start=1)}
        winners = [each.record for each in run.ranked if not each.is_baseline][: options.top]
        if not winners:
            raise ConfigError(
                f"{run.folder.path} has nothing to confirm: no trial but the baseline has "
                "finished an epoch"
            )
        candidates = [
            Candidate(name, trial.number, ranks.get(trial.number, 0), trial.config)
            for name, trial in [
                ("baseline", run.trials[0].record),
                *((f"trial {winner.number}", winner) for winner in winners),
            ]
        ]
        return cls(
            candidates=tuple(candidates),
            seeds=_fresh_seeds(run, options.seeds),
            space=run.space,
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

    def save(self, folder: RunFolder, run: str) -> None:
        asked = {**vars(self.asked), "seeds": list(self.seeds)}
        asked["configurations"] = [
            {**vars(each), "config": each.config.as_dict()} for each in self.candidates
        ]
        around = {"of": run, "versions": versions(), "machine": machine()}
        folder.write_search({"confirmation": asked, **around})

    def check_extends(self, folder: RunFolder) -> None:
        """Raise RunFolderError if the folder holds a confirmation that is not a part of this."""
        if not folder.search.exists():
            return
        before, asked = read_asked(folder), vars(self.asked)
        names = [
            name for name in asked if name != "seeds" and asked[name] != getattr(before, name)
        ]
        if before.seeds != self.seeds[: len(before.seeds)]:
            names.append("seeds")
        if names:
            raise RunFolderError(
                f"{folder.path} holds a confirmation with other {' and '.join(names)}: ask for "
                "the same and at least as many seeds to resume it, or move it away"
            )

    def start_line(self, folder: RunFolder, history: History, images: int, at_once: int) -> str:
        done = len(history.trials) - len(history.unfinished())
        so_far = f", {done:,} of them done in {duration(history.elapsed)}" if done else ""
        return (
            f"{short_path(folder.path)}: the baseline and "
            f"{count(len(self.candidates) - 1, 'winner')} on "
            f"{count(len(self.seeds), 'fresh seed')}, {self.rules.trials:,} trainings of "
            f"{count(self.epochs, 'epoch')}{so_far}, {at_once} at a time, "
            f"{count(images, 'training image')}, none held out, nothing picked"
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
        return confirmed_table(self.candidates, by_candidate, epochs=self.epochs, images=images)


def _fresh_seeds(run: RunView, wanted: int) -> tuple[int, ...]:
    """Return seeds that depend on the search's seed alone, and that none of its trials had."""
    used = {record.seed for record in run.history.trials.values()}
    # Trials draw theirs with a 1 at the end.
    streams = (np.random.SeedSequence([run.asked.seed or 0, stream, 2]) for stream in count_up())
    drawn = (int(stream.generate_state(1)[0]) for stream in streams)
    return tuple(islice((seed for seed in drawn if seed not in used), wanted))
