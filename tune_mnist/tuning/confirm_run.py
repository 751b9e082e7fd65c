"""Starting a confirmation, or going on with one: from the settings to the exit code."""

import math
import signal
import sys
from dataclasses import KW_ONLY, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from tune_mnist.analysis.runs import RunView
from tune_mnist.cli import tell
from tune_mnist.errors import ConfigError
from tune_mnist.mnist.data import load_mnist, split
from tune_mnist.mnist.precision import Precision
from tune_mnist.tuning.cluster import connected
from tune_mnist.tuning.confirmation import SEEDS, TOP, Confirmation, confirm
from tune_mnist.tuning.drawing import draw_report
from tune_mnist.tuning.mlflow import check_mlflow, mlflow_trackers
from tune_mnist.tuning.runner import Machinery
from tune_mnist.tuning.settings import SearchSettings, time_option
from tune_mnist.tuning.sharing import settle_share
from tune_mnist.tuning.trial import EpochSource, train_assignment

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
        machinery = Machinery(
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
