"""From settings to an exit code: a search, its confirmation, and the report at the end.

Searching and confirming are one flow: load the data, connect to Ray, settle what a trial takes,
hold the right to write to the run's folder, run a session on it, report how it ended.
"""

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tune_mnist.cli import tell
from tune_mnist.errors import ConfigError, RunFolderError, TuneMnistError, named
from tune_mnist.locations import check_run_name, is_remembered, storage_uri, tracking_uri
from tune_mnist.mnist.data import load_mnist, split
from tune_mnist.reporting.summary import summary
from tune_mnist.runs.checkpoints import Checkpoints
from tune_mnist.runs.confirmed import conclusion, confirmation_of, write_confirmed
from tune_mnist.runs.folder import RunFolder, check_new_run
from tune_mnist.runs.formatting import duration, short_path
from tune_mnist.runs.history import History
from tune_mnist.runs.view import RunView
from tune_mnist.supervise import works_on
from tune_mnist.tuning.cluster import connected
from tune_mnist.tuning.confirmation import Confirmation, NothingToConfirmError, keep_aside
from tune_mnist.tuning.experiment import Rules
from tune_mnist.tuning.live_view import start_line
from tune_mnist.tuning.packing import settle_resources
from tune_mnist.tuning.plan import Plan
from tune_mnist.tuning.remote import RemoteRun, reaching
from tune_mnist.tuning.resources import living_nodes
from tune_mnist.tuning.runner import Ending, Runtime, run_session, writing
from tune_mnist.tuning.settings import ConfirmOptions, ConfirmSettings, RunOn, SearchSettings
from tune_mnist.tuning.sync import check_new_copy, copied, folder_for
from tune_mnist.tuning.trackers import Tracker, mlflow_tracker
from tune_mnist.tuning.worker import EpochSource, train_assignment


def search(settings: SearchSettings, epochs_of: EpochSource | None = None) -> int:
    """Run or resume a search and return the exit code.

    Tests and benchmarks pass in `epochs_of` what a trial does instead of training. A search that
    cannot start or continue raises a TuneMnistError.
    """
    # A copy of the run is kept in line until nothing more is written.
    with ExitStack() as copies:
        if settings.resume is None:
            ended = _start(settings, epochs_of, copies)
        else:
            ended = _resume(settings, settings.resume, epochs_of, copies)
        code, plan, path = ended.exit_code, ended.plan, ended.folder.path
        unconfirmed: TuneMnistError | None = None
        if code == 0 and plan.confirm:
            left = max(plan.rules.time_limit - ended.history.elapsed, 1.0)
            options = ConfirmOptions(images=plan.rules.images, time_budget=left)
            on = replace(settings, precision=plan.precision)
            try:
                code = _confirm(path, options, on, epochs_of, at_end=True)
            except NothingToConfirmError as error:
                tell(str(error))
            except TuneMnistError as error:
                unconfirmed = error
        if code == 0 and settings.report:
            draw_report(path, settings.data_dir)
        if unconfirmed is not None:  # said last: the search itself went well
            raise unconfirmed
        return code


def confirm(settings: ConfirmSettings, epochs_of: EpochSource | None = None) -> int:
    """Run or resume the confirmation of a search and return the exit code, as `search` does."""
    if settings.run is None:
        raise ConfigError("name the search's folder, such as results/default")
    code = _confirm(settings.run, settings, settings, epochs_of)
    if code == 0 and settings.report:
        draw_report(settings.run, settings.data_dir)
    return code


@dataclass(frozen=True)
class _Search:
    """A search whose session has ended, or that had nothing left to do."""

    folder: RunFolder
    plan: Plan
    history: History
    exit_code: int = 0


def _start(settings: SearchSettings, epochs_of: EpochSource | None, copies: ExitStack) -> _Search:
    plan = Plan.of(settings)
    name = settings.run or f"{plan.rules.space.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_run_name(name)
    path = settings.results_dir / name
    copy = RemoteRun.of(path, plan.storage) if plan.storage else None
    check_new_run(path)
    if copy:
        check_new_copy(copy)
    with _runtime(plan.rules, settings, name, epochs_of) as runtime:
        folder = RunFolder.create(path)
        with folder.only_writer():
            if copy:
                copies.enter_context(copied(folder, copy)).begin()
            return _run(folder, plan, History(folder), runtime)


def _resume(
    settings: SearchSettings, resume: Path | str, epochs_of: EpochSource | None, copies: ExitStack
) -> _Search:
    copy = RemoteRun(storage_uri(resume)) if isinstance(resume, str) else None
    folder = folder_for(copy, settings.results_dir) if copy else RunFolder.open(Path(resume))
    with folder.only_writer():
        copy = copy or _copy_of(folder, settings)
        sync = copies.enter_context(copied(folder, copy)) if copy else None
        # All is read and checked before anything is written, here or there.
        before, history = Plan.load(folder), History.load(folder)
        plan = replace(before.changed_by(settings), storage=copy.storage if copy else None)
        history.reopen_hopeless()
        Checkpoints(folder).check(history.unfinished())
        if over := _why_nothing_is_left(plan, history):
            if sync:
                sync.begin()
            with writing(folder):
                plan.save_around_rules(folder)
            tell(f"{folder.path}: {over}")
            return _Search(folder, plan, history)
        before.check_comparable(folder, history)
        for difference in before.differences(folder, history):
            tell(f"warning: since {folder.path} was last worked on, {difference}")
        on = replace(settings, precision=plan.precision)
        with _runtime(plan.rules, on, folder.name, epochs_of) as runtime:
            if sync:
                sync.begin()
            return _run(folder, plan, history, runtime)


def _copy_of(folder: RunFolder, settings: SearchSettings) -> RemoteRun | None:
    """Return where the copy of a run is that is resumed in its folder, if it has one.

    The folder may come from elsewhere, and say where to send all that is found. To go on without
    the copy would let it fall behind unnoticed, so a place that only the folder names is refused.
    """
    plan = Plan.load(folder)
    storage = plan.changed_by(settings).storage
    if storage is None:
        return None
    copy = RemoteRun.of(folder.path, storage)
    if settings.storage is not None:
        with reaching(copy):
            copy.make()
    elif not is_remembered(copy.storage):
        raise RunFolderError(
            f"{folder.search} has its copy in {storage}, where you have copied nothing from this "
            f"machine: to trust it, add --storage '{storage}'; to go on without, remove the line "
            "'storage' there"
        )
    return copy


def _why_nothing_is_left(plan: Plan, history: History) -> str | None:
    if history.closed_as is None:  # killed: at least its tables need to be brought up to date
        return None
    if len(history.trials) >= plan.rules.trials and not history.unfinished():
        return f"all {plan.rules.trials} trials are finished; --trials N with a larger N adds more"
    if history.elapsed >= plan.search_rules.time_limit:
        part = "the search's part of " if plan.confirm else ""
        return (
            f"{part}the time budget of {duration(plan.rules.time_limit)} is used up; "
            "--time-budget with a longer time continues it"
        )
    return None


def _run(folder: RunFolder, plan: Plan, history: History, runtime: Runtime) -> _Search:
    works_on(folder.path)
    with writing(folder):
        plan.save(folder)
    rules = plan.search_rules
    line = start_line(folder, rules, history, runtime.resources, runtime.at_once, runtime.split)
    ending = run_session(folder, history, rules, runtime, line)
    Console().print(summary(folder, history, rules.metric, epochs=rules.epochs))
    again = f"python -m tune_mnist.search --resume {shlex.quote(str(folder.path))}"
    return _Search(folder, plan, history, _exit_code(ending, again))


def _confirm(
    path: Path,
    options: ConfirmOptions,
    settings: RunOn,
    epochs_of: EpochSource | None,
    *,
    at_end: bool = False,
) -> int:
    """Run or resume a confirmation; `at_end` of a search, an earlier one never refuses it."""
    run = RunView.read(path)
    confirmation = Confirmation.of(run, options)
    name = f"{run.folder.name} confirmed"
    with _runtime(confirmation.rules, settings, name, epochs_of) as runtime:
        confirmation = _continuing(run.folder, confirmation, at_end)
        rules, folder = confirmation.rules, run.folder.confirmation
        if not folder.path.is_dir():
            RunFolder.create(folder.path)
        images = len(runtime.split.train_labels)
        ending = None
        with folder.only_writer():
            works_on(path)
            history = History.load(folder)
            history.reopen_hopeless()
            Checkpoints(folder).check(history.unfinished())
            with writing(folder):
                confirmation.save(folder, run.folder.name, confirmation_of(run.folder))
            if len(history.trials) < rules.trials or history.unfinished():
                line = confirmation.start_line(folder, history, images, runtime.at_once)
                ending = run_session(folder, history, rules, runtime, line)
            _conclude(run.folder, confirmation, history, images)
    return _exit_code(ending, "the same command") if ending else 0


def _continuing(run: RunFolder, confirmation: Confirmation, at_end: bool) -> Confirmation:
    """Return what to train of a confirmation that may have an earlier part.

    An earlier one of other winners is kept aside: the search has gone on. One that was asked for
    otherwise raises RunFolderError, or is kept aside, too, at the end of a search.
    """
    folder = run.confirmation
    if not folder.search.exists():
        return confirmation
    with folder.only_writer():
        before = confirmation_of(run)
        if before is not None:
            confirmation = confirmation.continuing(before)
        others = confirmation.differences(before)
        if others and not at_end and others != ["winners"]:
            raise RunFolderError(
                f"{folder.path} holds a confirmation with other {' and '.join(others)}: ask for "
                "the same, with any number of seeds, to resume it, or move it away"
            )
        if others:
            with writing(run):
                kept = keep_aside(run)
            tell(f"the earlier confirmation, with other {' and '.join(others)}, is kept in {kept}")
    return confirmation


def _conclude(
    folder: RunFolder, confirmation: Confirmation, history: History, images: int
) -> None:
    console = Console()
    table = confirmation.table(history, images)
    if table is None:
        console.print(Text("Nothing is confirmed yet: no training has come to its end."))
        return
    with writing(folder):
        write_confirmed(folder, table)
    console.print(Text(f"\n{conclusion(table, confirmation.picked_by)}\n", style="bold"))
    console.print(Text(f"In {short_path(folder.path)}: confirmed.csv"))


@contextmanager
def _runtime(
    rules: Rules, settings: RunOn, name: str, epochs_of: EpochSource | None
) -> Iterator[Runtime]:
    """Load the data, connect to Ray and settle what a trial takes."""
    trackers: dict[str, Callable[[], Tracker]] = {}
    if settings.mlflow:
        trackers["MLflow"] = mlflow_tracker(tracking_uri(settings.mlflow), name)
    precision = settings.precision or "float32"
    holdout = rules.metric == "val_accuracy"
    data = split(load_mnist(settings.data_dir), holdout=holdout, images=rules.images)
    with connected(settings.address) as scratch:
        yield Runtime(
            settings=settings,
            scratch=scratch,
            resources=settle_resources(settings, data, precision),
            nodes=living_nodes(),
            split=data,
            epochs_of=epochs_of or partial(train_assignment, precision=precision),
            trackers=trackers,
        )


def _exit_code(ending: Ending, again: str) -> int:
    """Print what is left to do by the command `again`, and return the exit code."""
    for warning in ending.warnings:
        tell(f"warning: {warning}: {again} brings it up to date")
    if ending.signal is None:
        return 0
    tell(f"interrupted; resume it with {again}")
    return 128 + ending.signal


def draw_report(path: Path, data_dir: Path | None) -> None:
    """Draw a run's report; a search that went well does not fail because of it."""
    try:
        # Imported here, where it is needed: the charts' libraries take a second.
        from tune_mnist.reporting.page import write_report

        written = write_report([RunView.read(path)], data_dir=data_dir)
        tell(f"report: {short_path(written[0])}")
    except Exception as error:
        tell(
            f"warning: the report could not be drawn ({named(error)}); nothing else is missing, "
            f"and python -m tune_mnist.report {path} tries again"
        )
