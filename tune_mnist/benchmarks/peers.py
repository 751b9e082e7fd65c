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
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tune_mnist.benchmarks.measurements import Measurements, usable_cores
from tune_mnist.benchmarks.peer_systems import Task, read_progress
from tune_mnist.benchmarks.settings import PeersSettings, System
from tune_mnist.cli import tell
from tune_mnist.errors import TuneMnistError
from tune_mnist.mnist.data import default_data_dir, load_mnist
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History

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
    systems = [system for system in settings.systems if is_there(system)]
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


def is_there(system: System) -> bool:
    """Return True if a system can run here, and tell where it cannot."""
    if system == "syne_tune" and find_spec("syne_tune") is None:
        tell("syne_tune: skipped, as it is not installed (pip install syne-tune)")
        return False
    return True


def run(system: System, task: Task) -> dict[str, float]:
    """Run one system's search in a process of its own; return its `outcome`.

    Raises:
        TuneMnistError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="tune_mnist-peer-") as folder:
        task = replace(task, folder=folder)
        task.write()
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
        read = _own_progress if system == "ours" else read_progress
        if done.returncode != 0 or not (progress := read(folder)):
            said = " ".join(output.read_text("utf-8", errors="replace").split())[-600:]
            raise TuneMnistError(f"{system} failed with {done.returncode}: {said}")
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
        *("tune_mnist.search", "--results-dir", task.folder, "--run", "run"),
        *("--space", task.space, "--trials", str(task.trials)),
        *("--images", str(task.images), "--epochs", str(task.epochs)),
        *("--max-concurrent", str(task.at_once), "--seed", str(task.seed)),
        *("--data-dir", task.data_dir, "--no-report"),  # the others draw none
    ]


def _own_progress(folder: str) -> list[tuple[float, float]]:
    """Do as `read_progress`; our clock starts with each trial's record at a known time."""
    history = History.load(RunFolder.open(Path(folder) / "run"))
    return [
        (record.started_at + row.elapsed - record.started, row.val_accuracy)
        for record, row in history.rows
    ]


def _keys(measured: Measurements, systems: list[System]) -> dict[str, Any]:
    def by_system(quantity: str) -> dict[str, float]:
        return {system: measured.median(system, quantity) for system in systems}

    rates = by_system("epochs_per_hour")
    ours = rates.get("ours", float("nan"))
    return {
        "epochs_per_hour": rates,
        "images_per_second": by_system("images_per_second"),
        "ratio": {system: ours / rate for system, rate in rates.items() if system != "ours"},
        "seconds_to_99": by_system("seconds_to_99%"),
        "n": len(measured.values(systems[0], "seconds")) if systems else 0,
    }
