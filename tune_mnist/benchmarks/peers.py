"""`bench peers`: one search by tune_mnist and by what users would otherwise pick.

Same net, same training and validation images, same space, trials, epochs and concurrency, each as
one command from its start to its end. The searches differ in what they draw and stop, so they are
compared by the training images that a second of the whole command trains on.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter
from cyclopts.validators import Number

from tune_mnist.benchmarks.measurements import Measurements, usable_cores
from tune_mnist.benchmarks.peer_task import Progress, Task, read_progress, write_chosen
from tune_mnist.cli import tell
from tune_mnist.errors import TuneMnistError
from tune_mnist.mnist.data import default_data_dir, load_mnist
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History

System = Literal["ours", "ray", "optuna_threads", "optuna_processes", "syne_tune"]
GOOD = 0.99  # validation accuracy
AtLeast1 = Parameter(validator=Number(gte=1))


@dataclass(frozen=True, kw_only=True)
class PeersSettings:
    """Run one search by tune_mnist, Ray's documented recipe, Optuna alone and Syne Tune."""

    space: str = "quick"
    """Search space, one without conditions."""

    trials: Annotated[int, AtLeast1] = 8
    """Configurations."""

    images: Annotated[int, AtLeast1] = 6000
    """Training images."""

    epochs: Annotated[int, AtLeast1] = 4
    """Budget of a trial in epochs; ASHA stops the poor ones from the first on."""

    tests: Annotated[bool, Parameter(negative="")] = False
    """Have the others evaluate on the test images after every epoch, too, as ours always does."""

    at_once: Annotated[int | None, AtLeast1, Parameter(show_default=False)] = None
    """Trials at once, one core each; one for every core unless given."""

    rounds: Annotated[int, AtLeast1] = 2
    """Turns of each system, one after the other."""

    systems: Annotated[tuple[System, ...], Parameter(negative="", show_default=False)] = get_args(
        System
    )
    """Which systems; all unless given. Give several as --systems ours --systems ray."""

    quick: Annotated[bool, Parameter(negative="")] = False
    """One turn, a third of the images."""

    save: Path | None = None
    """Write every number to this CSV file."""

    data_dir: Path | None = None
    """Folder of MNIST, `DIR/MNIST/raw`; one in your cache folder unless given."""


@dataclass(frozen=True)
class Outcome:
    """What one system's search came to."""

    seconds: float  # the whole command
    epochs: int
    seconds_to_good: float | None  # until the first configuration at 99.0%

    @classmethod
    def of(cls, began: float, ended: float, progress: list[Progress]) -> "Outcome":
        """Sum up what a system's trials have noted."""
        good = [each.time - began for each in progress if each.val_accuracy >= GOOD]
        return cls(ended - began, len(progress), min(good, default=None))


def peers(settings: PeersSettings) -> None:
    """Measure and print."""
    data_dir = settings.data_dir or default_data_dir()
    load_mnist(data_dir)
    task = Task(
        space=settings.space,
        trials=settings.trials,
        images=settings.images // 3 if settings.quick else settings.images,
        epochs=settings.epochs,
        at_once=settings.at_once or usable_cores(),
        seed=0,
        tests=settings.tests,
        data_dir=str(data_dir),
        folder="",
    )
    task.searched()  # complains of a space with conditions before anything runs
    systems = [system for system in settings.systems if is_there(system)]
    taken = Measurements("peers")
    for turn in range(1 if settings.quick else settings.rounds):
        for system in list(systems):
            try:
                outcome = run(system, Task(**(asdict(task) | {"seed": turn})))
            except TuneMnistError as error:
                if system == "ours":
                    raise
                # What the others took minutes for is not to be lost with it.
                tell(f"{system}: left out from here on: {error}")
                systems.remove(system)
            else:
                _take(taken, system, outcome, task.images)
    taken.finish(_keys(taken, systems), settings.save)


def is_there(system: System) -> bool:
    """Say whether a system can run here, and tell where it cannot."""
    if system == "syne_tune" and find_spec("syne_tune") is None:
        tell("syne_tune: skipped, as it is not installed (pip install syne-tune)")
        return False
    return True


def run(system: System, task: Task) -> Outcome:
    """Run one system's search in a process of its own, from the command to its end.

    Raises:
        TuneMnistError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="tune_mnist-peer-") as folder:
        task = Task(**(asdict(task) | {"folder": folder}))
        write_chosen(task)
        output = Path(folder) / "output"
        began = time.time()
        with output.open("wb") as file:
            done = subprocess.run(
                [sys.executable, "-m", *_command(system, task)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"SYNETUNE_FOLDER": folder},
                check=False,
            )
        ended = time.time()
        read: Callable[[str], list[Progress]] = (
            _own_progress if system == "ours" else read_progress
        )
        if done.returncode != 0 or not (progress := read(folder)):
            said = " ".join(output.read_text("utf-8", errors="replace").split())[-600:]
            raise TuneMnistError(f"{system} failed with {done.returncode}: {said}")
    outcome = Outcome.of(began, ended, progress)
    tell(f"{system:<18} {outcome.epochs:>4} epochs in {outcome.seconds:.0f} s")
    return outcome


def _command(system: System, task: Task) -> list[str]:
    module = "tune_mnist.benchmarks.peer_"
    match system:
        case "ours":
            return [
                *("tune_mnist.search", "--results-dir", task.folder, "--run", "run"),
                *("--space", task.space, "--trials", str(task.trials)),
                *("--images", str(task.images), "--epochs", str(task.epochs)),
                *("--max-concurrent", str(task.at_once), "--seed", str(task.seed)),
                *("--data-dir", task.data_dir, "--no-report"),  # the others draw none
            ]
        case "optuna_threads" | "optuna_processes":
            return [f"{module}optuna", task.write(), system.removeprefix("optuna_")]
        case "ray" | "syne_tune":
            return [f"{module}{system}", task.write()]


def _own_progress(folder: str) -> list[Progress]:
    """Read our own run's epochs; its clock starts with each trial's record at a known time."""
    history = History.load(RunFolder.open(Path(folder) / "run"))
    return [
        Progress(
            time=record.started_at + row.elapsed - record.started,
            trial=str(record.number),
            val_accuracy=row.val_accuracy,
        )
        for record, row in history.rows
    ]


def _take(taken: Measurements, system: System, outcome: Outcome, images: int) -> None:
    taken.add(system, "seconds", outcome.seconds)
    taken.add(system, "epochs", outcome.epochs)
    taken.add(system, "epochs_per_hour", outcome.epochs * 3600 / outcome.seconds)
    taken.add(system, "images_per_second", outcome.epochs * images / outcome.seconds)
    if outcome.seconds_to_good is not None:
        taken.add(system, "seconds_to_99%", outcome.seconds_to_good)


def _keys(taken: Measurements, systems: list[System]) -> dict[str, Any]:
    def by_system(quantity: str) -> dict[str, float]:
        return {system: taken.median(system, quantity) for system in systems}

    rates = by_system("epochs_per_hour")
    ours = rates.get("ours", float("nan"))
    return {
        "epochs_per_hour": rates,
        "images_per_second": by_system("images_per_second"),
        "ratio": {system: ours / rate for system, rate in rates.items() if system != "ours"},
        "seconds_to_99": by_system("seconds_to_99%"),
        "n": len(taken.values(systems[0], "seconds")) if systems else 0,
    }
