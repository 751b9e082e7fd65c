"""Starting a search, or going on with one: everything from the settings to the exit code."""

import math
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from tune_mnist.cli import tell
from tune_mnist.mnist.data import Split, load_mnist, split
from tune_mnist.reporting.summary import listing, summary
from tune_mnist.runs.folder import RunFolder, check_new_run
from tune_mnist.runs.formatting import duration
from tune_mnist.runs.history import History
from tune_mnist.tuning.cluster import connected
from tune_mnist.tuning.confirmation import ConfirmSettings, confirm_run, draw_report
from tune_mnist.tuning.live_view import Progress, announce, start_line
from tune_mnist.tuning.packing import settle_share
from tune_mnist.tuning.plan import Plan
from tune_mnist.tuning.remote import RemoteRun
from tune_mnist.tuning.resources import TrialResources, living_nodes
from tune_mnist.tuning.runner import Runtime, run_session, writing
from tune_mnist.tuning.settings import SearchSettings
from tune_mnist.tuning.sync import check_new_copy, folder_for, kept_in_line
from tune_mnist.tuning.trackers import check_mlflow, mlflow_trackers
from tune_mnist.tuning.worker import EpochSource, train_assignment


def search(settings: SearchSettings, epochs_of: EpochSource | None = None) -> int:
    """Run or resume a search and return the exit code.

    Args:
        settings: what was asked.
        epochs_of: what a trial does instead of training; tests and benchmarks have scripted ones.

    Raises:
        TuneMnistError: the search could not be started, or could not go on.
    """
    if settings.list_runs:
        Console().print(listing(settings.results_dir))
        return 0
    try:
        # Ray's own way as well, from ray.init on; once trials run, a session has a better one.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        if settings.mlflow is not None:
            check_mlflow(settings.mlflow)
        with ExitStack() as copies:  # kept in line until nothing more is written
            if settings.resume is not None:
                path, code = _resume(settings, settings.resume, epochs_of, copies)
            else:
                path, code = _start(settings, epochs_of, copies)
            if code == 0 and (settings.confirm or Plan.load(RunFolder.open(path)).confirm):
                code = confirm_run(_confirming(path, settings), epochs_of)
            if code == 0 and settings.report:
                draw_report(path, settings.data_dir)
            return code
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        return 128 + signal.SIGTERM


def _start(
    settings: SearchSettings, epochs_of: EpochSource | None, copies: ExitStack
) -> tuple[Path, int]:
    plan = Plan.of(settings)
    name = settings.run or f"{plan.rules.space.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = settings.results_dir / name
    check_new_run(path)
    copy = RemoteRun.within(plan.storage, name) if plan.storage else None
    if copy:
        check_new_copy(copy)
    data = _load(settings, plan)
    with connected(settings.address):
        share = settle_share(settings, data, plan.precision)
        folder = RunFolder.create(path)
        with folder.only_writer():
            with writing(folder):
                plan.save(folder)
            if copy:
                copies.enter_context(kept_in_line(folder, copy))
            return path, _run(folder, History(folder), plan, settings, share, data, epochs_of)


def _resume(
    settings: SearchSettings, resume: Path | str, epochs_of: EpochSource | None, copies: ExitStack
) -> tuple[Path, int]:
    copy = RemoteRun(resume) if isinstance(resume, str) else None
    folder = folder_for(copy, settings.results_dir) if copy else RunFolder.open(Path(resume))
    with folder.only_writer():
        if copy is None and (storage := Plan.load(folder).raised(settings).storage):
            copy = RemoteRun.within(storage, folder.name)
        if copy:
            copies.enter_context(kept_in_line(folder, copy))
        before = Plan.load(folder)
        plan = replace(before.raised(settings), storage=copy.storage if copy else None)
        history = History.load(folder)
        if over := _why_nothing_is_left(plan, history):
            tell(f"{folder.path}: {over}")
            return folder.path, 0
        for difference in before.differences(folder):
            tell(f"warning: since {folder.path} was last worked on, {difference}")
        data = _load(settings, plan)
        with connected(settings.address):
            share = settle_share(settings, data, plan.precision)
            with writing(folder):
                plan.save(folder)
            return folder.path, _run(folder, history, plan, settings, share, data, epochs_of)


def _run(
    folder: RunFolder,
    history: History,
    plan: Plan,
    settings: SearchSettings,
    share: TrialResources,
    data: Split,
    epochs_of: EpochSource | None,
) -> int:
    with writing(folder):
        history.open_session({"trials": plan.rules.trials, "elapsed": history.elapsed})
    machinery = Runtime(
        share,
        settings.max_concurrent,
        settings.retries,
        settings.hang_timeout,
        epochs_of or partial(train_assignment, precision=plan.precision),
        mlflow_trackers(settings.mlflow, folder.name),
    )
    rules, console = plan.search_rules, Console()
    nodes = living_nodes()
    at_once = share.at_once(nodes, settings.max_concurrent)
    announce(console, start_line(folder, rules, history, share, at_once, data), nodes, share)
    with Progress(console) as progress:
        ending = run_session(folder, history, rules, machinery, data, progress)
    console.print(summary(folder, history, rules.metric, epochs=rules.epochs))
    for warning in ending.warnings:
        tell(f"warning: {warning}: --resume {folder.path} brings it up to date")
    if ending.signal:
        tell(f"interrupted; go on with: python -m tune_mnist.search --resume {folder.path}")
        return 128 + ending.signal
    return 0


def _confirming(path: Path, settings: SearchSettings) -> ConfirmSettings:
    """Return what to confirm the search's winners with: its own machine, and the time left."""
    folder = RunFolder.open(path)
    plan = Plan.load(folder).raised(settings)
    left = max(plan.rules.time_budget - History.load(folder).elapsed, 1.0)
    return ConfirmSettings(
        run=path,
        images=plan.images,
        time_budget=left if math.isfinite(left) else None,
        max_concurrent=settings.max_concurrent,
        precision=plan.precision,
        cpus_per_trial=settings.cpus_per_trial,
        gpus_per_trial=settings.gpus_per_trial,
        pack=settings.pack,
        address=settings.address,
        retries=settings.retries,
        hang_timeout=settings.hang_timeout,
        mlflow=settings.mlflow,
        report=False,  # the search's own follows
        data_dir=settings.data_dir,
    )


def _load(settings: SearchSettings, plan: Plan) -> Split:
    holdout = plan.rules.metric == "val_accuracy"
    return split(load_mnist(settings.data_dir), holdout=holdout, images=plan.images)


def _why_nothing_is_left(plan: Plan, history: History) -> str | None:
    """Say why there is nothing to resume, or return None."""
    if history.closed_as is None:  # killed: its tables are to be brought up to date at least
        return None
    if len(history.trials) >= plan.rules.trials and not history.unfinished():
        return f"all {plan.rules.trials} trials are finished; --trials N with a larger N adds more"
    if history.elapsed >= plan.search_rules.time_budget:
        part = "the search's part of " if plan.confirm else ""
        return (
            f"{part}the time budget of {duration(plan.rules.time_budget)} is used up; "
            "--time-budget with a longer time goes on"
        )
    return None
