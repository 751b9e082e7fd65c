"""`bench turnaround`: what a search costs besides the training.

From one trial to the next, from the command to the first step, per report, over many trials, in
memory. Trials that train nothing show the bookkeeping alone; real ones show the whole cost.

The busy share is how much of its slots' time a search spends in training and evaluation. A slot's
time runs from its first step to its last report: the start is a number of its own, and at the end
of a search some slots have nothing left to do. A trial's evaluation was asked for and counts as
busy; the share of the steps alone stands beside it.
"""

from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from tune_mnist.benchmarks.measurements import Measurements
from tune_mnist.benchmarks.settings import TurnaroundSettings
from tune_mnist.benchmarks.watched import Note, time_to_first_step, watch_search
from tune_mnist.cli import tell
from tune_mnist.errors import ConfigError, TuneMnistError
from tune_mnist.mnist.data import load_mnist
from tune_mnist.reporting.findings import most_at_once
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History

EPOCHS = 5  # of a trivial trial, all of which train to their end
FEW = 100  # trials of the searches that a long one is compared with
QUICK = ("--space", "quick", "--images", "1280")
TRIVIAL = ("--space", "sgd", "--images", "200")


def turnaround(settings: TurnaroundSettings) -> None:
    load_mnist(settings.data_dir)
    data = () if settings.data_dir is None else ("--data-dir", str(settings.data_dir))
    measured = Measurements("turnaround")
    measure_start(measured, 1 if settings.quick else 3, data)
    measure_turnaround(measured, 8 if settings.quick else 24, data)
    few = min(FEW, settings.trials // 4)
    measure_reports(measured, few, 4 * few if settings.quick else settings.trials, data)
    run = settings.run
    share, steps = busy_shares_of_run(run) if run else measure_busy(settings, data)
    measured.add("real trials", "busy_share", share)
    measured.add("real trials", "steps_share", steps)
    measured.finish(_keys(measured), settings.save)


def measure_start(measured: Measurements, times: int, data: tuple[str, ...]) -> None:
    """From the command to the first training step, caches warm."""
    tell("starting searches until their first training step")
    # The first one fills the caches: of files, and of compiled loops.
    for subject in ["search command, first of all", *["search command"] * times]:
        seconds = time_to_first_step(*QUICK, "--trials", "2", "--epochs", "1", *data)
        measured.add(subject, "first_step_s", seconds)


def measure_turnaround(measured: Measurements, trials: int, data: tuple[str, ...]) -> None:
    """From a trial's last report to the next one's first step, and the memory of a trial."""
    tell(f"running {trials} real trials of few images")
    workers, _ = watch_search("real", *QUICK, "--trials", str(trials), "--epochs", "2", *data)
    measured.add("real trials", "turnaround_s", *turnarounds(workers))
    for notes in workers:
        most = max(note.resident for note in notes)
        measured.add("real trials", "worker_mb", most)
        measured.add("real trials", "trial_added_mb", most - notes[0].idle)


def measure_reports(measured: Measurements, few: int, many: int, data: tuple[str, ...]) -> None:
    """Per report, in short searches and over a long one between them."""
    tell(f"running {few}, {many:,} and {few} trivial trials of {EPOCHS} epochs")
    epochs = ("--epochs", str(EPOCHS), "--grace-epochs", str(EPOCHS))
    for subject, trials in (("few trials", few), ("many trials", many), ("few trials", few)):
        workers, driver_megabytes = watch_search(
            "trivial", *TRIVIAL, "--trials", str(trials), *epochs, *data
        )
        reports = sorted(note.ended for notes in workers for note in notes)
        measured.add(subject, "ms_per_report", ms_per_report(reports))
        measured.add(subject, "ms_between_reports", *ms_between_reports(workers))
        measured.add(subject, "turnaround_s", *turnarounds(workers))
        measured.add(subject, "driver_mb", max(driver_megabytes))
        if subject == "many trials":
            quarter = len(reports) // 4
            measured.add("first quarter", "ms_per_report", ms_per_report(reports[:quarter]))
            measured.add("last quarter", "ms_per_report", ms_per_report(reports[-quarter:]))


def measure_busy(settings: TurnaroundSettings, data: tuple[str, ...]) -> tuple[float, float]:
    """Return the busy share of a search of real trials, and the share of the steps alone.

    Raises TuneMnistError if no trial finished an epoch.
    """
    minutes = min(settings.minutes, 0.75) if settings.quick else settings.minutes
    tell(f"searching for {minutes:g} minutes")
    images = ("--images", "6000") if settings.quick else ()
    budget = ("--time-budget", f"{minutes * 60:g}s", "--trials", "1000")
    workers, _ = watch_search("real", "--space", "quick", *budget, *images, *data)
    if not workers:
        raise TuneMnistError(f"no trial finished an epoch within {minutes:g} minutes")
    return busy_shares(workers)


def busy_shares(workers: list[list[Note]]) -> tuple[float, float]:
    """Return the share of the workers' time in training and evaluation, and in training alone."""
    slots = sum(notes[-1].ended - notes[0].began for notes in workers)
    busy = sum(note.ended - note.began for notes in workers for note in notes)
    steps = sum(note.training for notes in workers for note in notes)
    return busy / slots, steps / slots


def busy_shares_of_run(path: Path) -> tuple[float, float]:
    """Return the same for a run in its folder, as seen by its driver.

    A run's files do not tell which slot ran a trial: slots are as many as epochs overlapped, from
    the first epoch's start to the last report. Raises RunFolderError if the folder holds no run,
    ConfigError if the run has too few epochs.
    """
    rows = [row for _, row in History.load(RunFolder.open(path)).rows]
    if len(rows) < 2:
        raise ConfigError(f"--run: {path} has {len(rows)} epochs, too few to say how busy it was")
    spans = [(row.elapsed - row.seconds - row.evaluation_seconds, row.elapsed) for row in rows]
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    slots = most_at_once(spans) * wall
    training = sum(row.seconds for row in rows)
    return (training + sum(row.evaluation_seconds for row in rows)) / slots, training / slots


def ms_per_report(reports: list[float]) -> float:
    """Return the milliseconds per report where nothing but reports takes time."""
    return (reports[-1] - reports[0]) * 1e3 / (len(reports) - 1)


def ms_between_reports(workers: list[list[Note]]) -> list[float]:
    """Return the milliseconds between reports of one trial, shared by the trials beside it."""
    pairs = chain.from_iterable(map(pairwise, workers))
    times = [after.ended - before.ended for before, after in pairs if before.trial == after.trial]
    return [time * 1e3 / len(workers) for time in times]


def turnarounds(workers: list[list[Note]]) -> list[float]:
    """Return the seconds from a trial's last report to the next one's first step, by worker."""
    pairs = chain.from_iterable(map(pairwise, workers))
    return [after.began - before.ended for before, after in pairs if before.trial != after.trial]


def _keys(measured: Measurements) -> dict[str, Any]:
    per_report = measured.median("few trials", "ms_per_report")
    many = measured.median("many trials", "ms_per_report")
    between = measured.median("many trials", "ms_between_reports")
    first = measured.median("first quarter", "ms_per_report")
    last = measured.median("last quarter", "ms_per_report")
    return {
        "turnaround_s": measured.median("real trials", "turnaround_s"),
        "first_step_s": measured.median("search command", "first_step_s"),
        "busy_share": measured.median("real trials", "busy_share"),
        "steps_share": measured.median("real trials", "steps_share"),
        "ms_per_report": per_report,
        "many_trials_ratio": many / per_report,
        "flatness": last / first,
        "ms_between_reports": between,
        "ratio_to_reports_alone": many / between,
        "trivial_turnaround_s": measured.median("many trials", "turnaround_s"),
        "driver_mb": measured.median("many trials", "driver_mb"),
        "trial_added_mb": max(measured.values("real trials", "trial_added_mb")),
        "trials": len(measured.values("many trials", "turnaround_s")),
    }
