"""One session on Ray: wires Tune, Optuna and a run's folder together, and runs to an end."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from ray import tune
from ray.exceptions import RayError
from ray.tune.error import TuneError
from rich.console import Console

from tune_mnist.errors import SearchFailedError
from tune_mnist.mnist.data import Split
from tune_mnist.runs.checkpoints import Checkpoints
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History
from tune_mnist.runs.tables import write_tables
from tune_mnist.supervise import stops
from tune_mnist.tuning.experiment import Experiment, Rules
from tune_mnist.tuning.live_view import Progress, announce
from tune_mnist.tuning.ray_patches import (
    DRIVER_ENVIRONMENT,
    IN_THIS_PROCESS,
    callbacks_not_counted,
    memory_kills_survived,
    staging_in,
)
from tune_mnist.tuning.resources import Node, Room, TrialResources
from tune_mnist.tuning.settings import RunOn
from tune_mnist.tuning.study import Study
from tune_mnist.tuning.study_file import StudyFile
from tune_mnist.tuning.trackers import EventFiles, Tracker, Tracking
from tune_mnist.tuning.tune_adapters import (
    ExperimentScheduler,
    ExperimentSearcher,
    SearchOverError,
    Supervisor,
)
from tune_mnist.tuning.worker import EpochSource, run_trial


@dataclass(frozen=True)
class Runtime:
    """What a session runs with, beside its rules."""

    settings: RunOn
    scratch: Path
    resources: TrialResources
    nodes: Sequence[Node]
    split: Split
    epochs_of: EpochSource
    trackers: Mapping[str, Callable[[], Tracker]]  # beside TensorBoard, by what people call them

    @property
    def at_once(self) -> int:
        """How many trials run at a time on the nodes that there are at the start."""
        return self.resources.at_once(self.nodes, self.settings.max_concurrent)


@dataclass(frozen=True)
class Ending:
    """How a session ended."""

    signal: int | None  # the signal that ended it early
    warnings: tuple[str, ...]  # what could not be brought up to date, and is not needed


def run_session(
    folder: RunFolder, history: History, rules: Rules, runtime: Runtime, start_line: str
) -> Ending:
    """Run a search on the connected Ray until it is over or a signal ends it.

    If it cannot continue, it raises SearchFailedError; what it had finished is in the folder.
    """
    with writing(folder):
        history.open_session(
            {"trials": rules.trials, "elapsed": history.elapsed, "asked": rules.lasting}
        )
    console = Console()
    announce(console, start_line, runtime.nodes, runtime.resources)
    study = Study(rules, StudyFile(folder.study, rules.metric))
    experiment = Experiment(rules, history, study, Checkpoints(folder))
    supervisor = Supervisor(
        experiment, retries=runtime.settings.retries, hang_timeout=runtime.settings.hang_timeout
    )
    trackers = {"TensorBoard": lambda: EventFiles(folder.tensorboard), **runtime.trackers}
    tracking = [Tracking(name, history, start) for name, start in trackers.items()]
    with (
        contextlib.closing(Progress(console, experiment, folder)) as progress,
        stops.acting(supervisor.heed),
    ):
        with experiment.ending_on_error(), _explaining_ray(folder):
            _fit(experiment, supervisor, runtime, progress)
        return _close(experiment, folder, supervisor, tracking)


def _fit(
    experiment: Experiment, supervisor: Supervisor, runtime: Runtime, progress: Progress
) -> None:
    os.environ.update(DRIVER_ENVIRONMENT)
    resources = runtime.resources
    room = Room(resources, runtime.settings.max_concurrent)
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, epochs_of=runtime.epochs_of, split=runtime.split),
        {"cpu": resources.cpus, "gpu": resources.gpus},
    )
    with (
        staging_in(str(runtime.scratch)),
        memory_kills_survived(),
        callbacks_not_counted(),
        contextlib.suppress(SearchOverError),
    ):
        # Not tune.Tuner: that pickles searcher and callbacks for its own way to restore.
        tune.run(
            trainable,
            name="tune",
            storage_path=str(runtime.scratch),
            search_alg=ExperimentSearcher(experiment, room, supervisor.stop_all),
            scheduler=ExperimentScheduler(experiment),
            num_samples=-1,
            stop=supervisor,
            callbacks=[supervisor, progress],
            max_failures=0,  # the supervisor retries
            reuse_actors=True,
            raise_on_failed_trial=False,
            trial_name_creator=attrgetter("trial_id"),
            trial_dirname_creator=attrgetter("trial_id"),
            verbose=0,
            **IN_THIS_PROCESS,
        )


def _close(
    experiment: Experiment, folder: RunFolder, supervisor: Supervisor, tracking: list[Tracking]
) -> Ending:
    behind = [each.close() for each in tracking]
    error = experiment.broken
    if error is None:
        try:
            study_failure = experiment.close(_why(experiment, supervisor.signal))
            if study_failure is not None:
                behind.insert(0, f"{folder.study} is behind ({study_failure}); nothing is lost")
            write_tables(folder, experiment.history, experiment.rules.metric)
            left = tuple(each for each in behind if each is not None)
            return Ending(supervisor.signal, left)
        except OSError as failure:
            error = failure
    with contextlib.suppress(OSError):  # the folder may be what is broken
        experiment.close("failed")
        write_tables(folder, experiment.history, experiment.rules.metric)
    with writing(folder):
        raise error


def _why(experiment: Experiment, received: int | None) -> str:
    if received:
        return signal.Signals(received).name
    return "out of time" if experiment.has_next or experiment.running else "finished"


@contextlib.contextmanager
def writing(folder: RunFolder) -> Iterator[None]:
    """Turn an error in writing to a run's folder into a SearchFailedError."""
    try:
        yield
    except OSError as error:
        raise SearchFailedError(
            f"cannot write to {error.filename or folder.path} ({error.strerror}): make room or "
            f"make it writable, then continue with --resume {folder.path}; what was finished is "
            "safe"
        ) from error


@contextlib.contextmanager
def _explaining_ray(folder: RunFolder) -> Iterator[None]:
    """Turn an error of Ray or Tune, whose message may be a traceback, into a SearchFailedError."""
    try:
        yield
    except (RayError, TuneError) as error:
        lines = str(error).split("\n")
        cause = next(filter(str.strip, reversed(lines)), type(error).__name__)
        raise SearchFailedError(
            f"Ray Tune cannot continue ({cause.strip()[:300]}): see to its cause, then continue "
            f"with --resume {folder.path}; what was finished is safe"
        ) from error
