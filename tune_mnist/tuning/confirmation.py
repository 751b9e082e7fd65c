"""Training the winners and the baseline of a search again, on all images and fresh seeds.

A confirmation is a search whose trials are all settled beforehand and that stops none of them
early. It has a folder of its own within the run's and everything that a search has: it resumes,
retries, shares the machine out and is shown in the same way.
"""

import math
import signal
import sys
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from cyclopts import Group, Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.text import Text

from tune_mnist.cli import tell
from tune_mnist.errors import ConfigError, RunFolderError
from tune_mnist.mnist.config import Precision
from tune_mnist.mnist.data import Split, load_mnist, split
from tune_mnist.runs.confirmed import (
    Candidate,
    conclusion,
    confirmed_table,
    write_confirmed,
)
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.formatting import count, duration, short_path
from tune_mnist.runs.history import History
from tune_mnist.runs.space import SearchSpace
from tune_mnist.runs.view import RunView
from tune_mnist.tuning.cluster import connected
from tune_mnist.tuning.experiment import FixedTrial, Rules
from tune_mnist.tuning.live_view import Progress, announce
from tune_mnist.tuning.packing import settle_share
from tune_mnist.tuning.plan import machine, versions
from tune_mnist.tuning.resources import living_nodes
from tune_mnist.tuning.runner import Ending, Runtime, run_session, writing
from tune_mnist.tuning.settings import SearchSettings, time_option
from tune_mnist.tuning.trackers import check_mlflow, mlflow_trackers
from tune_mnist.tuning.worker import EpochSource, train_assignment

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
        baseline = run.trials[0]
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
            epochs=epochs or run.asked.epochs,
            images=images,
        )

    @property
    def listed(self) -> tuple[FixedTrial, ...]:
        """The trainings, all candidates with one seed before any with the next.

        So a confirmation that is broken off compares like with like, and more seeds come last.
        """
        return tuple(
            FixedTrial(
                candidate.config,
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
                {**vars(candidate), "config": candidate.config.as_dict()}
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
    machinery: Runtime,
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
    console.print(Text(f"\n{conclusion(table)}\n", style="bold"))
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
    base = run.asked.seed
    found: list[int] = []
    stream = 0
    while len(found) < wanted:
        # Trials draw theirs with a 1 at the end.
        seed = int(np.random.SeedSequence([base, stream, 2]).generate_state(1)[0])
        stream += 1
        if seed not in used:
            found.append(seed)
    return tuple(found)


# MERGED-DOC tuning.confirm_run: Starting a confirmation, or going on with one: from the settings
# to the exit code.

_WHAT = Group.create_ordered("What to confirm")
_WHERE = Group.create_ordered("What to run on")
_AtLeast1 = Parameter(group=_WHAT, show_default=False, validator=Number(gte=1))


@dataclass(frozen=True)
class ConfirmSettings:
    """Train a search's winners and the baseline again, on all images and fresh seeds.

    The mean test accuracy at the last epoch, with its interval, is a figure that nothing was
    picked by. Asked again, it goes on where it was broken off; with more seeds, it adds them.
    """

    run: Annotated[Path | None, Parameter(group=_WHAT, show_default=False)] = None
    """Folder of the search."""

    _: KW_ONLY

    top: Annotated[int, Parameter(group=_WHAT, validator=Number(gte=1))] = TOP
    """How many of the best configurations; the baseline comes on top."""

    seeds: Annotated[int, Parameter(group=_WHAT, validator=Number(gte=1))] = SEEDS
    """Seeds that each is trained with; the search has used none of them."""

    epochs: Annotated[int | None, _AtLeast1] = None
    """How long each is trained; as long as the search's trials may unless given."""

    images: Annotated[int | None, _AtLeast1] = None
    """Train on this many images only, for a quick look; all 60,000 unless given."""

    time_budget: Annotated[float | None, time_option(_WHAT)] = None
    """Stop after this long: 90s, 10m, 1.5h. What is finished by then counts."""

    max_concurrent: Annotated[int | None, Parameter(group=_WHERE, show_default=False)] = None
    """Trainings at once; as many as fit unless given."""

    cpus_per_trial: Annotated[float, Parameter(group=_WHERE)] = 1.0
    """CPU cores that a training takes."""

    gpus_per_trial: Annotated[float | None, Parameter(group=_WHERE, show_default=False)] = None
    """GPUs that a training takes; a quarter where there is a GPU, else none."""

    pack: Annotated[Literal["off", "auto"], Parameter(group=_WHERE)] = "off"
    """auto tries for some seconds how many trainings at once this machine serves best."""

    precision: Annotated[Precision, Parameter(group=_WHERE)] = "float32"
    """What a GPU computes training steps in; tf32 and bf16 are less precise."""

    address: Annotated[str | None, Parameter(group=_WHERE, show_default=False)] = None
    """A running Ray cluster: auto or HOST:PORT on one of its nodes, ray://HOST:PORT from outside.
    Without it, this machine."""

    retries: Annotated[int, Parameter(group=_WHERE)] = 3
    """Times that a training is tried again when it fails; an epoch resets the count."""

    hang_timeout: Annotated[float, time_option(_WHERE)] = 1800.0
    """Give up a training that has not finished an epoch for this long; 30m unless given."""

    report: Annotated[bool, Parameter(group=_WHERE)] = True
    """Draw the run's report.html again, with what was confirmed."""

    mlflow: Annotated[str | None, Parameter(group=_WHERE, show_default=False)] = None
    """Also log the trainings to MLflow: the URI of a tracking server or store."""

    data_dir: Annotated[Path | None, Parameter(group=_WHERE, show_default=False)] = None
    """Folder that holds MNIST/raw, or gets it; your cache folder unless given."""

    def __post_init__(self) -> None:
        self.as_search()  # which checks what the two have in common

    def as_search(self) -> SearchSettings:
        """Return a search's settings with what the two have in common."""
        common = {entry.name for entry in fields(SearchSettings)} - {"run", "report"}
        shared: dict[str, Any] = {
            entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name in common
        }
        return SearchSettings(**shared)


def confirm_run(settings: ConfirmSettings, epochs_of: EpochSource | None = None) -> int:
    """Run or go on with a confirmation and return the exit code.

    Args:
        settings: what was asked.
        epochs_of: what is done instead of training; the tests have scripted ones.

    Raises:
        TuneMnistError: it could not be started, or could not go on.
    """
    if settings.run is None:
        raise ConfigError("name the search's folder, such as results/default")
    try:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        train = epochs_of or partial(train_assignment, precision=settings.precision)
        return _confirm(settings, settings.run, train)
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        return 128 + signal.SIGTERM


def _confirm(settings: ConfirmSettings, path: Path, epochs_of: EpochSource) -> int:
    run = RunView.read(path)
    if settings.mlflow is not None:
        check_mlflow(settings.mlflow)
    asked = Confirmation.of(
        run,
        top=settings.top,
        seeds=settings.seeds,
        epochs=settings.epochs,
        images=settings.images,
    )
    data = split(load_mnist(settings.data_dir), holdout=False, images=settings.images)
    with connected(settings.address):
        machinery = Runtime(
            settle_share(settings.as_search(), data, settings.precision),
            settings.max_concurrent,
            settings.retries,
            settings.hang_timeout,
            epochs_of,
            mlflow_trackers(settings.mlflow, f"{run.folder.name} confirmed"),
        )
        budget = settings.time_budget or math.inf
        ending = confirm(run, asked, machinery, data, time_budget=budget)
    for warning in ending.warnings if ending else ():
        tell(f"warning: {warning}")
    if ending and ending.signal:
        tell("interrupted; the same command goes on with it")
        return 128 + ending.signal
    if settings.report:
        draw_report(path, settings.data_dir)
    return 0


# MERGED-DOC tuning.drawing: The report at the end of a search or a confirmation.


def draw_report(path: Path, data_dir: Path | None) -> None:
    """Draw a run's report; a search that went well does not fail for a picture of it."""
    try:
        # Imported here, where they are needed: the charts' libraries take a second.
        from tune_mnist.reporting.page import report_path, write_report
        from tune_mnist.runs.view import RunView

        run = RunView.read(path)
        written = write_report([run], report_path([run]), data_dir=data_dir)
        tell(f"report: {short_path(written[0])}")
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        tell(
            f"warning: the report could not be drawn ({what}); nothing else is missing, and "
            f"python -m tune_mnist.report {path} tries again"
        )
