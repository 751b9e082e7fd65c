"""What a user can ask of a search or of a confirmation; both command lines are made from it.

Each option is declared once: type, default, limits, help and panel in --help.
"""

import math
import re
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from tune_mnist.cli import AT_LEAST_0, AT_LEAST_1, Limit, Options, UserPath, flag, read_by
from tune_mnist.errors import ConfigError
from tune_mnist.locations import check_run_name, is_uri, storage_uri, tracking_uri, user_path
from tune_mnist.mnist.config import MAX_EPOCHS, Precision
from tune_mnist.mnist.metrics import Metric

_WHAT = Parameter(group=Group.create_ordered("What to search"))
_HOW = Parameter(group=Group.create_ordered("How to search"))
_CONFIRM = Parameter(group=Group.create_ordered("What to confirm"))
_WHERE = Parameter(group=Group.create_ordered("What to run on"))
_RUN = Parameter(group=Group.create_ordered("The run"))
_ONLY_ON = Parameter(negative="")  # a flag without a --no- form

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile("".join(rf"(?:([0-9]+(?:\.[0-9]+)?){unit})?" for unit in _UNITS))


def parse_duration(text: str) -> float:
    """Return the seconds in `90`, `90s`, `10m`, `1.5h`, `1h30m` or `2d`, or raise ConfigError."""
    if text and (match := _DURATION.fullmatch(text)):
        parts = zip(match.groups(default="0"), _UNITS.values(), strict=True)
        return sum(float(number) * seconds for number, seconds in parts)
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f"a time is written like 90s, 10m, 1.5h or 1h30m, but got '{text}'"
        ) from None


def _folder_or_uri(text: str) -> Path | str:
    return text if is_uri(text) else user_path(text)


_TIME = read_by(parse_duration, show_default=False, metavar="TIME")
_FOLDER_OR_URI = read_by(_folder_or_uri, metavar="RUN")
_MOST_EPOCHS = Limit.at_most(MAX_EPOCHS)
_ABOVE_0_SECONDS = Limit("above 0 seconds", lambda value: value > 0)
_ABOVE_1 = Limit("above 1", lambda value: 1 < value < math.inf)
_THOUSAND = Limit.at_most(1000)  # trainings, each of minutes
# Ray counts in parts of 0.0001, and refuses a smaller one.
_SHARE = Limit("0, or from 0.0001 to 1000", lambda value: value == 0 or 1e-4 <= value <= 1000)
_PART_OF_ONE = Limit(
    "0, or from 0.0001 to 1: a trial uses one GPU at most",
    lambda value: value == 0 or 1e-4 <= value <= 1,
)


@dataclass(frozen=True, kw_only=True)
class RunOn(Options):
    """What a search or a confirmation runs on, and what it leaves beside the run's own files."""

    max_concurrent: Annotated[int | None, _WHERE, AT_LEAST_1] = None
    """Trials at once; as many as fit unless given."""

    cpus_per_trial: Annotated[float, _WHERE, AT_LEAST_0, _SHARE] = 1.0
    """CPU cores that a trial takes."""

    gpus_per_trial: Annotated[float | None, _WHERE, AT_LEAST_0, _PART_OF_ONE] = None
    """Part of a GPU that a trial takes, at most 1; a quarter where there is a GPU, else none."""

    pack: Annotated[Literal["off", "auto"], _WHERE] = "off"
    """auto tries for some seconds how many trials at once this machine serves best, and takes
    the CPUs and GPUs per trial from that."""

    precision: Annotated[Precision | None, _WHERE] = None
    """What a GPU computes training steps in, float32 unless given; tf32 and bf16 are less precise.
    Evaluation is always in float32."""

    address: Annotated[str | None, _WHERE] = None
    """A running Ray cluster: auto or HOST:PORT on one of its nodes, ray://HOST:PORT from outside.
    Without it, this machine."""

    retries: Annotated[int, _WHERE, AT_LEAST_0] = 3
    """Times that a failed trial is tried again; each epoch it finishes resets the count."""

    hang_timeout: Annotated[float, _WHERE, _TIME, _ABOVE_0_SECONDS] = 1800.0
    """Mark a trial failed that has not finished an epoch for this long; 30m unless given."""

    report: Annotated[bool, _RUN] = True
    """Draw the run's report.html at the end."""

    mlflow: Annotated[str | None, _RUN] = None
    """Also log the trials to MLflow, in an experiment named after the run: the URI of a tracking
    server or store, such as http://HOST:5000 or sqlite:///mlflow.db."""

    data_dir: Annotated[UserPath | None, _RUN] = None
    """Folder that holds MNIST/raw, or gets it; your cache folder unless given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlflow is not None:
            tracking_uri(self.mlflow)
        if self.pack == "auto" and (self.gpus_per_trial is not None or self.cpus_per_trial != 1):
            raise ConfigError(
                "--pack auto chooses --cpus-per-trial and --gpus-per-trial: leave them out, or it"
            )


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Options):
    """What a search goes by; `search.yaml` holds these entries, resolved, under `asked`."""

    metric: Annotated[Metric, _HOW] = "val_accuracy"
    """What steers the search. val_accuracy holds out 5,000 training images; test_accuracy trains
    on all 60,000 and picks its winner on the test set."""

    trials: Annotated[int | None, _WHAT, AT_LEAST_1] = None
    """Configurations to try in all; 50 unless given."""

    epochs: Annotated[int | None, _WHAT, AT_LEAST_1, _MOST_EPOCHS] = None
    """Budget of a trial in epochs; the space's own (20) unless given."""

    time_budget: Annotated[float | None, _WHAT, _TIME, _ABOVE_0_SECONDS] = None
    """Stop after this long: 90s, 10m, 1.5h. Without it, the trials decide."""

    images: Annotated[int | None, _WHAT, AT_LEAST_1] = None
    """Train on this many images only, for a quick look; all of them unless given."""

    grace_epochs: Annotated[int, _HOW, AT_LEAST_1] = 1
    """ASHA stops no trial before this many epochs."""

    reduction_factor: Annotated[float, _HOW, _ABOVE_1] = 2.0
    """At each rung, ASHA lets about one trial in this many continue."""

    startup_trials: Annotated[int, _HOW, AT_LEAST_0] = 10
    """Random configurations before Optuna's model proposes."""

    no_start: Annotated[bool, _HOW, _ONLY_ON] = False
    """Leave out the space's start points, so that the search has to find its winner itself."""

    seed: Annotated[int, _HOW, AT_LEAST_0] = 0
    """Fixes what is proposed and every trial's training."""


@dataclass(frozen=True, kw_only=True)
class StartOptions(Options):
    """Which search to start, resume or list."""

    space: Annotated[str, _WHAT] = "default"
    """Search space: a name (default, refined, sgd, quick) or the path of a YAML file."""

    run: Annotated[str | None, _RUN] = None
    """Name of the run's folder; the space and the time unless given."""

    results_dir: Annotated[UserPath, _RUN] = Path("results")
    """Folder in which the run's folder is made."""

    storage: Annotated[str | None, _RUN] = None
    """Keep a copy of the run here as well, within seconds: s3://BUCKET/FOLDER, gs://..., abfs://...
    or a shared folder. --resume s3://BUCKET/FOLDER/RUN resumes it on any machine."""

    resume: Annotated[Path | str | None, _RUN, _FOLDER_OR_URI] = None
    """Resume the run in this folder, or the copy at this URI, with the settings it was started
    with. --trials and --time-budget may be raised, and what it runs on may change."""

    confirm: Annotated[bool, _RUN, _ONLY_ON] = False
    """Afterwards train the three best and the baseline again, on all images and five fresh seeds;
    half of a time budget is kept for it."""

    list_runs: Annotated[bool, _RUN, _ONLY_ON, Parameter(name="--list")] = False
    """List the runs in the folder of results with their state and best, and start nothing."""


_MAY_CHANGE_ON_RESUME = {
    *(entry.name for entry in fields(RunOn)),
    *("resume", "trials", "time_budget", "storage", "confirm"),
}


# --help lists the options of the last base first.
@dataclass(frozen=True, kw_only=True)
class SearchSettings(RunOn, SearchOptions, StartOptions):
    """Search for good hyperparameters of the MNIST net.

    Optuna proposes configurations, Ray Tune trains several at a time, ASHA stops the poor ones
    early. The space's start points, known to be good, come first, then the reference baseline:
    among --trials it is the last at the latest. Ctrl-C ends a search in order; --resume continues
    it, also after a crash.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run is not None:
            check_run_name(self.run)
        if self.storage is not None:
            storage_uri(self.storage)
        if self.resume is not None:
            self._check_resume()

    def resuming(self, run: Path | None) -> "SearchSettings":
        """Return the settings that resume what these have started in a run's folder, if any."""
        if run is None or self.resume is not None:
            return self
        on = {entry.name: getattr(self, entry.name) for entry in fields(RunOn)}
        return SearchSettings(resume=run, storage=self.storage, **on)

    def _check_resume(self) -> None:
        may_change = _MAY_CHANGE_ON_RESUME
        if isinstance(self.resume, str):
            storage_uri(self.resume)
            # The copy's folder is where it is; the local one may be made anywhere.
            may_change = may_change - {"storage"} | {"results_dir"}
        for entry in fields(self):
            fixed = entry.name not in may_change
            if fixed and getattr(self, entry.name) != entry.default:
                raise ConfigError(
                    f"{flag(entry.name)} cannot be changed with --resume, which takes it from "
                    "the run's search.yaml: leave it out, or start a new run"
                )


@dataclass(frozen=True)
class ConfirmOptions(Options):
    """Which search to confirm, and how thoroughly."""

    run: Annotated[UserPath | None, _CONFIRM] = None
    """Folder of the search."""

    _: KW_ONLY

    top: Annotated[int, _CONFIRM, AT_LEAST_1, _THOUSAND] = 3
    """How many of the best configurations; the baseline comes on top."""

    seeds: Annotated[int, _CONFIRM, AT_LEAST_1, _THOUSAND] = 5
    """Seeds that each is trained with; the search has used none of them."""

    epochs: Annotated[int | None, _CONFIRM, AT_LEAST_1, _MOST_EPOCHS] = None
    """How long each is trained; as long as the search's trials may unless given."""

    images: Annotated[int | None, _CONFIRM, AT_LEAST_1] = None
    """Train on this many images only, for a quick look; all 60,000 unless given."""

    time_budget: Annotated[float | None, _CONFIRM, _TIME, _ABOVE_0_SECONDS] = None
    """Stop after this long: 90s, 10m, 1.5h. What is finished by then counts."""


@dataclass(frozen=True)
class ConfirmSettings(RunOn, ConfirmOptions):
    """Train a search's winners and the baseline again, on all images and fresh seeds.

    The mean test accuracy at the last epoch, with its interval, is a figure that nothing was
    picked by. Each training is a trial. The same command resumes a confirmation that was
    interrupted; with more seeds, it adds them.
    """
