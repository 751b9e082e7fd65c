"""What a user can ask of a search; the command line and `search.yaml` are made from it."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.config import Precision
from tune_mnist.mnist.metrics import Metric
from tune_mnist.tuning.remote import is_uri, storage_uri

_WHAT = Group.create_ordered("What to search")
_HOW = Group.create_ordered("How to search")
_WHERE = Group.create_ordered("What to run on")
_RUN = Group.create_ordered("The run")

_MAY_CHANGE_ON_RESUME = (
    "resume",
    "trials",
    "time_budget",
    "max_concurrent",
    "precision",
    "cpus_per_trial",
    "gpus_per_trial",
    "pack",
    "address",
    "retries",
    "hang_timeout",
    "data_dir",
    "storage",
    "report",
    "confirm",
    "mlflow",
)
_MAX_EPOCHS = 1000  # as in a space file
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile("".join(rf"(?:([0-9]+(?:\.[0-9]+)?){unit})?" for unit in _UNITS))


def parse_duration(text: str) -> float:
    """Return the seconds in `90`, `90s`, `10m`, `1.5h`, `1h30m` or `2d`.

    Raises:
        ConfigError: the text is no duration.
    """
    if text and (match := _DURATION.fullmatch(text)):
        parts = zip(match.groups(default="0"), _UNITS.values(), strict=True)
        return sum(float(number) * seconds for number, seconds in parts)
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f"a time is written like 90s, 10m, 1.5h or 1h30m, but got '{text}'"
        ) from None


def _duration(type_: Any, tokens: Any) -> float:
    return parse_duration(tokens[0].value)


def _folder_or_uri(type_: Any, tokens: Any) -> Path | str:
    text = str(tokens[0].value)
    return text if is_uri(text) else Path(text)


def time_option(group: Group) -> Parameter:
    """Return how a field that is a time is given on the command line."""
    return Parameter(
        group=group, converter=_duration, n_tokens=1, show_default=False, metavar="TIME"
    )


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Search for good hyperparameters of the MNIST net.

    Optuna proposes configurations, Ray Tune trains several at a time, ASHA stops the poor ones
    early. The reference baseline is always the first trial. Ctrl-C ends a search in order;
    --resume goes on with it, as it does after a crash.
    """

    space: Annotated[str, Parameter(group=_WHAT)] = "default"
    """Search space: a name (default, sgd, quick) or the path of a YAML file."""

    trials: Annotated[int | None, Parameter(group=_WHAT, show_default=False)] = None
    """Configurations to try in all; 50 unless given."""

    epochs: Annotated[int | None, Parameter(group=_WHAT, show_default=False)] = None
    """Budget of a trial in epochs; the space's own (20) unless given."""

    time_budget: Annotated[float | None, time_option(_WHAT)] = None
    """Stop after this long: 90s, 10m, 1.5h. Without it, the trials decide."""

    images: Annotated[int | None, Parameter(group=_WHAT, show_default=False)] = None
    """Train on this many images only, for a quick look; all of them unless given."""

    metric: Annotated[Metric, Parameter(group=_HOW)] = "val_accuracy"
    """What steers the search. val_accuracy holds out 5,000 training images; test_accuracy trains
    on all 60,000 and picks its winner on the test set."""

    grace_epochs: Annotated[int, Parameter(group=_HOW)] = 1
    """ASHA stops no trial before this many epochs."""

    reduction_factor: Annotated[float, Parameter(group=_HOW)] = 2.0
    """ASHA lets about one trial in so many go on from a rung."""

    startup_trials: Annotated[int, Parameter(group=_HOW)] = 10
    """Random configurations before Optuna's model proposes."""

    seed: Annotated[int, Parameter(group=_HOW)] = 0
    """Fixes what is proposed and every trial's training."""

    max_concurrent: Annotated[int | None, Parameter(group=_WHERE, show_default=False)] = None
    """Trials at once; as many as fit unless given."""

    cpus_per_trial: Annotated[float, Parameter(group=_WHERE)] = 1.0
    """CPU cores that a trial takes."""

    gpus_per_trial: Annotated[float | None, Parameter(group=_WHERE, show_default=False)] = None
    """GPUs that a trial takes, such as 0.25; a quarter where there is a GPU, else none."""

    pack: Annotated[Literal["off", "auto"], Parameter(group=_WHERE)] = "off"
    """auto tries for some seconds how many trials at once this machine serves best, and takes
    the CPUs and GPUs per trial from that."""

    precision: Annotated[Precision | None, Parameter(group=_WHERE, show_default=False)] = None
    """What a GPU computes training steps in, float32 unless given; tf32 and bf16 are less precise.
    Evaluation is always in float32."""

    address: Annotated[str | None, Parameter(group=_WHERE, show_default=False)] = None
    """A running Ray cluster: auto or HOST:PORT on one of its nodes, ray://HOST:PORT from outside.
    Without it, this machine."""

    retries: Annotated[int, Parameter(group=_WHERE)] = 3
    """Times that a trial is tried again when it fails; each epoch it finishes resets the count."""

    hang_timeout: Annotated[float, time_option(_WHERE)] = 1800.0
    """Give up a trial that has not finished an epoch for this long; 30m unless given."""

    run: Annotated[str | None, Parameter(group=_RUN, show_default=False)] = None
    """Name of the run's folder; the space and the time unless given."""

    results_dir: Annotated[Path, Parameter(group=_RUN)] = Path("results")
    """Folder in which the run's folder is made."""

    storage: Annotated[str | None, Parameter(group=_RUN, show_default=False)] = None
    """Keep a copy of the run here as well, within seconds: s3://BUCKET/FOLDER, gs://..., abfs://...
    or a shared folder. --resume s3://BUCKET/FOLDER/RUN goes on with it on any machine."""

    resume: Annotated[
        Path | str | None,
        Parameter(
            group=_RUN, show_default=False, converter=_folder_or_uri, n_tokens=1, metavar="RUN"
        ),
    ] = None
    """Go on with the run in this folder, or with the copy at this URI: all it was asked is taken
    from there. --trials and --time-budget may be raised, and what it runs on may change."""

    confirm: Annotated[bool, Parameter(group=_RUN, negative="")] = False
    """Then train the three best and the baseline again, on all images and five fresh seeds; of
    a time budget, half is kept for it."""

    report: Annotated[bool, Parameter(group=_RUN)] = True
    """Draw the run's report.html when the search has ended."""

    mlflow: Annotated[str | None, Parameter(group=_RUN, show_default=False)] = None
    """Also log the trials to MLflow, in an experiment named after the run: the URI of a tracking
    server or store, such as http://HOST:5000 or sqlite:///mlflow.db."""

    list_runs: Annotated[bool, Parameter(name="--list", negative="", group=_RUN)] = False
    """Show the runs in the folder of results with their state and best, and start nothing."""

    data_dir: Annotated[Path | None, Parameter(group=_RUN, show_default=False)] = None
    """Folder that holds MNIST/raw, or gets it; your cache folder unless given."""

    def __post_init__(self) -> None:
        for name in ("trials", "epochs", "images", "grace_epochs", "max_concurrent"):
            self._check(name, lambda value: value >= 1, "at least 1")
        self._check("epochs", lambda value: value <= _MAX_EPOCHS, f"at most {_MAX_EPOCHS}")
        for name in ("startup_trials", "seed", "retries", "cpus_per_trial", "gpus_per_trial"):
            self._check(name, lambda value: 0 <= value < math.inf, "at least 0")
        for name in ("time_budget", "hang_timeout"):
            self._check(name, lambda value: value > 0, "above 0 seconds")
        self._check("reduction_factor", lambda value: 1 < value < math.inf, "above 1")
        self._check(
            "gpus_per_trial",
            lambda value: value <= 1 or value % 1 == 0,
            "a fraction of one GPU or a whole number",
        )
        if self.pack == "auto" and (self.gpus_per_trial is not None or self.cpus_per_trial != 1):
            raise ConfigError(
                "--pack auto chooses --cpus-per-trial and --gpus-per-trial: leave them out, or it"
            )
        if self.run is not None and (Path(self.run).name != self.run or self.run in ("", "..")):
            raise ConfigError(f"--run must be a plain name, without folders, but got '{self.run}'")
        if self.storage is not None:
            storage_uri(self.storage)
        if self.resume is not None:
            self._check_resume()

    def _check(self, name: str, holds: Callable[[float], bool], rule: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise ConfigError(f"{flag(name)} must be {rule}, but got {value:g}")

    def _check_resume(self) -> None:
        may_change = set(_MAY_CHANGE_ON_RESUME)
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


def flag(name: str) -> str:
    """Return a setting's name on the command line."""
    return "--" + name.replace("_", "-")
