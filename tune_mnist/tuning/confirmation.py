"""Training the winners and the baseline of a search again, on all images and fresh seeds.

A confirmation is a search whose trials are all settled beforehand and that stops none of them
early. It has a folder of its own within the run's and everything that a search has: it resumes,
retries, shares the machine out and is shown in the same way.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.text import Text

from tune_mnist.analysis.confirmed import (
    Candidate,
    claim,
    confirmed_table,
    write_confirmed,
)
from tune_mnist.analysis.history import History
from tune_mnist.analysis.run import RunFolder
from tune_mnist.analysis.runs import RunView
from tune_mnist.analysis.wording import count, duration, short_path
from tune_mnist.errors import ConfigError, RunFolderError
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Split
from tune_mnist.tuning.display import announce
from tune_mnist.tuning.experiment import Listed, Rules
from tune_mnist.tuning.nodes import living_nodes
from tune_mnist.tuning.plan import machine, versions
from tune_mnist.tuning.progress import Progress
from tune_mnist.tuning.runner import Ending, Machinery, run_session, writing
from tune_mnist.tuning.space import SearchSpace

TOP, SEEDS = 3, 5


@dataclass(frozen=True)
class Confirmation:
    """What is trained again."""

    candidates: tuple[Candidate, ...]  # the baseline first
    seeds: tuple[int, ...]
    epochs: int
    images: int | None  # training images; None: all there are

    @classmethod
    def of(
        cls, run: RunView, *, top: int, seeds: int, epochs: int | None, images: int | None
    ) -> Self:
        """Settle what to confirm of a run.

        Args:
            run: the search.
            top: how many of its best configurations.
            seeds: how many seeds each is trained with.
            epochs: how long; as long as the search's trials may unless given.
            images: on how many training images; all unless given.

        Raises:
            ConfigError: the search has nothing to confirm yet.
        """
        ranks = {each.record.number: rank for rank, each in enumerate(run.ranked, start=1)}
        winners = [each for each in run.ranked if not each.is_baseline][:top]
        if not winners:
            raise ConfigError(
                f"{run.folder.path} has nothing to confirm: no trial but the baseline has "
                "finished an epoch"
            )
        baseline = run.standings[0]
        return cls(
            candidates=(
                Candidate("baseline", 0, ranks.get(0, 0), baseline.record.config),
                *(
                    Candidate(f"trial {n}", n, ranks[n], each.record.config)
                    for each in winners
                    for n in [each.record.number]
                ),
            ),
            seeds=_fresh_seeds(run, seeds),
            epochs=epochs or run.epochs,
            images=images,
        )

    @property
    def listed(self) -> tuple[Listed, ...]:
        """The trainings, all candidates with one seed before any with the next.

        So a confirmation that is broken off compares like with like, and more seeds come last.
        """
        return tuple(
            Listed(
                TrainConfig.from_mapping(candidate.config),
                seed,
                "start" if position else "baseline",
            )
            for seed in self.seeds
            for position, candidate in enumerate(self.candidates)
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for the folder's search.yaml."""
        return {
            "epochs": self.epochs,
            "images": self.images,
            "seeds": list(self.seeds),
            "configurations": [
                {**vars(candidate), "config": dict(candidate.config)}
                for candidate in self.candidates
            ],
        }

    def check_goes_on(self, before: Mapping[str, Any], folder: RunFolder) -> None:
        """See that what the folder has is a part of what is asked.

        Raises:
            RunFolderError: it is something else.
        """
        asked = self.as_dict()
        seeds = before.get("seeds")
        names = [name for name in asked if name != "seeds" and asked[name] != before.get(name)]
        if not isinstance(seeds, list) or seeds != asked["seeds"][: len(seeds)]:
            names.append("seeds")
        if names:
            raise RunFolderError(
                f"{folder.path} holds a confirmation with other {' and '.join(names)}: ask for "
                "the same and as many seeds or more to go on with it, or move it away"
            )


def confirm(
    run: RunView,
    asked: Confirmation,
    machinery: Machinery,
    split: Split,
    *,
    time_budget: float = math.inf,
) -> Ending | None:
    """Do or go on with a confirmation on the connected Ray, write confirmed.csv and say the claim.

    Args:
        run: the search.
        asked: what to train.
        machinery: what to train with.
        split: all training images, none held out.
        time_budget: s, over all sessions.

    Returns:
        How the session ended; None where there was nothing left to do.

    Raises:
        RunFolderError: another confirmation is there.
        SearchFailedError: it could not go on; what it had finished is safe.
    """
    folder = _folder(run)
    console = Console()
    with folder.only_writer():
        rules = _rules(run, asked, time_budget)
        history = History.load(folder)
        if folder.search.exists():
            asked.check_goes_on(folder.read_search().get("confirmation", {}), folder)
        with writing(folder):
            folder.write_search(
                {
                    "confirmation": asked.as_dict(),
                    "of": run.folder.name,
                    "versions": versions(),
                    "machine": machine(),
                }
            )
        ending = None
        if len(history.trials) < rules.trials or history.unfinished():
            with writing(folder):
                history.open_session({"trials": rules.trials, "elapsed": history.elapsed})
            nodes, share = living_nodes(), machinery.share
            at_once = share.at_once(nodes, machinery.max_concurrent)
            start = _start_line(folder, asked, history, at_once, split)
            announce(console, start, nodes, share)
            with Progress(console) as progress:
                ending = run_session(folder, history, rules, machinery, split, progress)
        _conclude(run.folder, asked, history, len(split.train_labels), console)
    return ending


def _conclude(
    folder: RunFolder, asked: Confirmation, history: History, images: int, console: Console
) -> None:
    """Write the table and say what it comes to."""
    width = len(asked.candidates)
    ended = [record for record in history.trials.values() if record.state != "running"]
    by_candidate = [
        [record for record in ended if record.number % width == position]
        for position in range(width)
    ]
    if not any(record.state == "complete" for record in ended):
        console.print(Text("Nothing is confirmed yet: no training has come to its end."))
        return
    table = confirmed_table(asked.candidates, by_candidate, epochs=asked.epochs, images=images)
    with writing(folder):
        write_confirmed(folder, table)
    console.print(Text(f"\n{claim(table)}\n", style="bold"))
    console.print(Text(f"In {short_path(folder.path)}: confirmed.csv"))


def _folder(run: RunView) -> RunFolder:
    path = run.folder.path / "confirm"
    return RunFolder(path) if path.is_dir() else RunFolder.create(path)


def _rules(run: RunView, asked: Confirmation, time_budget: float) -> Rules:
    search = run.search
    space = SearchSpace.from_dict(search.get("space"), "confirmation", str(run.folder.search))
    listed = asked.listed
    return Rules(
        space=space,
        metric="test_accuracy",
        trials=len(listed),
        epochs=asked.epochs,
        time_budget=time_budget,
        grace_epochs=asked.epochs,  # none is stopped early
        reduction_factor=2.0,
        startup_trials=0,
        seed=0,
        listed=listed,
    )


def _start_line(
    folder: RunFolder, asked: Confirmation, history: History, at_once: int, split: Split
) -> str:
    done = len(history.trials) - len(history.unfinished())
    so_far = f", {done:,} of them done in {duration(history.elapsed)}" if done else ""
    return (
        f"{short_path(folder.path)}: the baseline and {count(len(asked.candidates) - 1, 'winner')}"
        f" on {count(len(asked.seeds), 'fresh seed')}, {len(asked.listed):,} trainings of "
        f"{count(asked.epochs, 'epoch')}{so_far}, {at_once} at a time, "
        f"{count(len(split.train_labels), 'training image')}, none held out, nothing picked"
    )


def _fresh_seeds(run: RunView, wanted: int) -> tuple[int, ...]:
    """Return seeds that depend on the search's alone, and that none of its trials had."""
    used = {record.seed for record in run.history.trials.values()}
    base = int(run.asked.get("seed") or 0)
    found: list[int] = []
    stream = 0
    while len(found) < wanted:
        # Trials draw theirs with a 1 at the end.
        seed = int(np.random.SeedSequence([base, stream, 2]).generate_state(1)[0])
        stream += 1
        if seed not in used:
            found.append(seed)
    return tuple(found)
