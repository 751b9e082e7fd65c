"""`bench peers`: one search by tune_mnist and by what users would otherwise pick.

Same net, same training and validation images, same space, trials, epochs and concurrency, each as
one command from its start to its end. The searches differ in what they draw and stop, so they are
compared by the training images that a second of the whole command trains on.
"""

import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tune_mnist.benchmarks.measurements import Measurements, usable_cores
from tune_mnist.benchmarks.peer_systems import Task, read_progress
from tune_mnist.benchmarks.settings import PeersSettings, System
from tune_mnist.benchmarks.watched import epochs_of_run, last_words, own_run, started
from tune_mnist.cli import tell
from tune_mnist.errors import TuneMnistError
from tune_mnist.mnist.data import default_data_dir, load_mnist

GOOD = 0.99  # validation accuracy


def peers(settings: PeersSettings) -> None:
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
    task.load_space()  # refuses a space with conditions before anything runs
    systems = list(settings.systems)
    if "syne_tune" in systems and find_spec("syne_tune") is None:
        tell("syne_tune: skipped, as it is not installed (pip install syne-tune)")
        systems.remove("syne_tune")
    measured = Measurements("peers")
    for turn in range(1 if settings.quick else settings.rounds):
        for system in list(systems):
            try:
                found = run(system, replace(task, seed=turn))
            except TuneMnistError as error:
                if system == "ours":
                    raise
                # Others have taken minutes: keep their numbers.
                tell(f"{system}: left out from here on: {error}")
                systems.remove(system)
            else:
                for quantity, value in found.items():
                    measured.add(system, quantity, value)
    measured.finish(_keys(measured, systems), settings.save)


def run(system: System, task: Task) -> dict[str, float]:
    """Return the `outcome` of one system's command, or raise TuneMnistError."""
    with tempfile.TemporaryDirectory(prefix="tune_mnist-peer-") as name:
        folder = Path(name)
        task = replace(task, folder=name)
        task.write()
        began = time.time()
        with started(system, _command(system, task), folder, SYNETUNE_FOLDER=name):
            pass
        ended = time.time()
        progress = read_progress(folder)
        if system == "ours":
            rows = epochs_of_run(folder)
            progress = [(record.time_of(row), row.val_accuracy) for record, row in rows]
        if not progress:
            raise TuneMnistError(f"{system} recorded no epoch: {last_words(folder)}")
    found = outcome(began, ended, progress, task.images)
    tell(f"{system:<18} {len(progress):>4} epochs in {found['seconds']:.0f} s")
    return found


def outcome(
    began: float, ended: float, progress: list[tuple[float, float]], images: int
) -> dict[str, float]:
    """Return the quantities of a command, from `read_progress` and the images of an epoch."""
    seconds, epochs = ended - began, len(progress)
    good = [end - began for end, val_accuracy in progress if val_accuracy >= GOOD]
    return {
        "seconds": seconds,
        "epochs": epochs,
        "epochs_per_hour": epochs * 3600 / seconds,
        "images_per_second": epochs * images / seconds,
    } | ({"seconds_to_99%": min(good)} if good else {})


def _command(system: System, task: Task) -> list[str]:
    if system != "ours":
        return ["tune_mnist.benchmarks.peer_systems", system, task.file]
    return [
        *("tune_mnist.search", *own_run(Path(task.folder))),  # the others draw no report either
        *("--space", task.space, "--trials", str(task.trials)),
        *("--images", str(task.images), "--epochs", str(task.epochs)),
        *("--max-concurrent", str(task.at_once), "--seed", str(task.seed)),
        *("--data-dir", task.data_dir),
    ]


def _keys(measured: Measurements, systems: list[System]) -> dict[str, Any]:
    rates = measured.medians(systems, "epochs_per_hour")
    ours = rates.get("ours", float("nan"))
    return {
        "epochs_per_hour": rates,
        "images_per_second": measured.medians(systems, "images_per_second"),
        "ratio": {system: ours / rate for system, rate in rates.items() if system != "ours"},
        "seconds_to_99": measured.medians(systems, "seconds_to_99%"),
        "n": len(measured.values(systems[0], "seconds")) if systems else 0,
    }
