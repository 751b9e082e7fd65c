"""`bench turnaround`: what a search costs beside the training.

From one trial to the next, from the command to the first step, per report, over many trials, in
memory. Trials that train nothing show the bookkeeping alone; real ones show what it comes to.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from tune_mnist.benchmarks.busy import busy_shares, busy_shares_of_run
from tune_mnist.benchmarks.measurements import Measurements
from tune_mnist.benchmarks.sources import turnarounds
from tune_mnist.benchmarks.watched_search import Observation, time_to_first_step, watch_search
from tune_mnist.cli import tell
from tune_mnist.mnist.data import load_mnist

EPOCHS = 5  # of a trivial trial, all of which train to their end
FEW = 100  # trials of the searches that a long one is compared with


@dataclass(frozen=True, kw_only=True)
class TurnaroundSettings:
    """Measure what a search costs beside training: between trials, per report, at the start."""

    trials: Annotated[int, Parameter(validator=Number(gte=8))] = 2000
    """Trivial trials of the long search."""

    minutes: Annotated[float, Parameter(validator=Number(gt=0))] = 3.0
    """Length of the search of full-size epochs."""

    run: Annotated[Path | None, Parameter(show_default=False)] = None
    """Take the busy share from this finished run instead of a search of its own."""

    quick: Annotated[bool, Parameter(negative="")] = False
    """Fewer trials, and epochs of 6,000 images instead of full-size ones."""

    save: Path | None = None
    """Write every number to this CSV file."""

    data_dir: Path | None = None
    """Folder of MNIST, `DIR/MNIST/raw`; one in your cache folder unless given."""


def turnaround(settings: TurnaroundSettings) -> None:
    """Measure and print."""
    load_mnist(settings.data_dir)
    data = () if settings.data_dir is None else ("--data-dir", str(settings.data_dir))
    taken = Measurements("turnaround")
    measure_start(taken, 1 if settings.quick else 3, data)
    measure_turnaround(taken, 8 if settings.quick else 24, data)
    few = min(FEW, settings.trials // 4)
    measure_reports(taken, few, 4 * few if settings.quick else settings.trials, data)
    if settings.run is not None:
        share, steps = busy_shares_of_run(settings.run)
    else:
        share, steps = measure_busy(settings, data)
    taken.add("real trials", "busy_share", share)
    taken.add("real trials", "steps_share", steps)
    taken.finish(_keys(taken), settings.save)


def measure_start(taken: Measurements, times: int, data: tuple[str, ...]) -> None:
    """From the command to the first training step, caches warm."""
    tell("starting searches until their first training step")
    # The first one fills the caches: of files, and of compiled loops.
    subjects = ["search command, first of all", *["search command"] * times]
    for subject in subjects:
        seconds = time_to_first_step(
            ["--space", "quick", "--trials", "2", "--epochs", "1", "--images", "1280", *data]
        )
        taken.add(subject, "first_step_s", seconds)


def measure_turnaround(taken: Measurements, trials: int, data: tuple[str, ...]) -> None:
    """From a trial's last report to the next one's first step, and the memory of a trial."""
    tell(f"running {trials} real trials of few images")
    seen = watch_search(
        "real",
        ["--space", "quick", "--trials", str(trials), "--epochs", "2", "--images", "1280", *data],
    )
    taken.add("real trials", "turnaround_s", *turnarounds(seen.workers))
    for notes in seen.workers:
        taken.add("real trials", "worker_mb", max(note.resident for note in notes))
        added = max(note.resident for note in notes) - notes[0].idle
        taken.add("real trials", "trial_added_mb", added)


def measure_reports(taken: Measurements, few: int, many: int, data: tuple[str, ...]) -> None:
    """Per report, in short searches and over a long one between them."""
    tell(f"running {few}, {many:,} and {few} trivial trials of {EPOCHS} epochs")
    for subject, trials in (("few trials", few), ("many trials", many), ("few trials", few)):
        seen = watch_search(
            "trivial",
            [
                *("--space", "sgd", "--trials", str(trials), "--epochs", str(EPOCHS)),
                *("--grace-epochs", str(EPOCHS), "--images", "200", *data),
            ],
        )
        reports = [note.ended for note in seen.notes]
        taken.add(subject, "ms_per_report", ms_per_report(reports))
        taken.add(subject, "ms_between_reports", *_between_reports(seen))
        taken.add(subject, "turnaround_s", *turnarounds(seen.workers))
        taken.add(subject, "driver_mb", max(seen.driver_megabytes))
        if subject == "many trials":
            quarter = len(reports) // 4
            taken.add("first quarter", "ms_per_report", ms_per_report(reports[:quarter]))
            taken.add("last quarter", "ms_per_report", ms_per_report(reports[-quarter:]))


def measure_busy(settings: TurnaroundSettings, data: tuple[str, ...]) -> tuple[float, float]:
    """The share of the slots' time that real trials train for, with evaluation and without."""
    minutes = min(settings.minutes, 0.75) if settings.quick else settings.minutes
    tell(f"searching for {minutes:g} minutes")
    images = ("--images", "6000") if settings.quick else ()
    budget = ("--time-budget", f"{minutes * 60:g}s", "--trials", "1000")
    seen = watch_search("real", ["--space", "quick", *budget, *images, *data])
    return busy_shares(seen.workers)


def ms_per_report(reports: list[float]) -> float:
    """Return the milliseconds that a report takes where nothing but reports takes time."""
    return (reports[-1] - reports[0]) * 1e3 / (len(reports) - 1)


def _between_reports(seen: Observation) -> list[float]:
    """Return the milliseconds between reports of one trial, shared by the trials beside it."""
    return [
        (after.ended - before.ended) * 1e3 / len(seen.workers)
        for notes in seen.workers
        for before, after in pairwise(notes)
        if before.trial == after.trial
    ]


def _keys(taken: Measurements) -> dict[str, Any]:
    per_report = taken.median("few trials", "ms_per_report")
    many = taken.median("many trials", "ms_per_report")
    first, last = (taken.median(f"{side} quarter", "ms_per_report") for side in ("first", "last"))
    return {
        "turnaround_s": taken.median("real trials", "turnaround_s"),
        "first_step_s": taken.median("search command", "first_step_s"),
        "busy_share": taken.median("real trials", "busy_share"),
        "steps_share": taken.median("real trials", "steps_share"),
        "ms_per_report": per_report,
        "many_trials_ratio": many / per_report,
        "flatness": last / first,
        "ms_between_reports": taken.median("many trials", "ms_between_reports"),
        "ratio_to_reports_alone": many / taken.median("many trials", "ms_between_reports"),
        "trivial_turnaround_s": taken.median("many trials", "turnaround_s"),
        "driver_mb": taken.median("many trials", "driver_mb"),
        "trial_added_mb": max(taken.values("real trials", "trial_added_mb")),
        "trials": len(taken.values("many trials", "turnaround_s")),
    }
