"""Starting a search, or going on with one: everything from the settings to the exit code."""

import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from tune_mnist.analysis.history import History
from tune_mnist.analysis.listing import listing
from tune_mnist.analysis.run import RunFolder, check_new_run
from tune_mnist.analysis.summary import summary
from tune_mnist.analysis.wording import duration, short_path
from tune_mnist.cli import tell
from tune_mnist.errors import ClusterError
from tune_mnist.mnist.data import Split, load_mnist, split
from tune_mnist.tuning.cluster import Share, connected, node_resources
from tune_mnist.tuning.display import start_line
from tune_mnist.tuning.packing import Probe, best_of, largest_node, probe_all
from tune_mnist.tuning.plan import Plan
from tune_mnist.tuning.progress import Progress
from tune_mnist.tuning.runner import Machinery, run_session, writing
from tune_mnist.tuning.settings import SearchSettings
from tune_mnist.tuning.trial import EpochSource, train_assignment

DEFAULT_GPU_SHARE = 0.25
PACK_SECONDS = 5.0  # that each packing is tried


def search(settings: SearchSettings, epochs_of: EpochSource = train_assignment) -> int:
    """Run or resume a search and return the exit code.

    Args:
        settings: what was asked.
        epochs_of: what a trial does; the tests and benchmarks have scripted ones.

    Raises:
        TuneMnistError: the search could not be started, or could not go on.
    """
    if settings.list_runs:
        Console().print(listing(settings.results_dir))
        return 0
    try:
        # Ray's own way as well, from ray.init on; once trials run, a session has a better one.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        if settings.resume is not None:
            path, code = settings.resume, _resume(settings, settings.resume, epochs_of)
        else:
            path, code = _start(settings, epochs_of)
        if code == 0 and settings.report:
            _report(path, settings)
        return code
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        return 128 + signal.SIGTERM


def _report(path: Path, settings: SearchSettings) -> None:
    """Draw the report; a search that went well does not fail for a picture of it."""
    # Imported here, where they are needed: the charts' libraries take a second.
    from tune_mnist.analysis.report import report_path, write_report
    from tune_mnist.analysis.runs import RunView

    try:
        run = RunView.read(path)
        written = write_report([run], report_path([run]), data_dir=settings.data_dir)
        tell(f"report: {short_path(written[0])}")
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        tell(
            f"warning: the report could not be drawn ({what}); nothing else is missing, and "
            f"python -m tune_mnist.report {path} tries again"
        )


def _start(settings: SearchSettings, epochs_of: EpochSource) -> tuple[Path, int]:
    plan = Plan.of(settings)
    name = settings.run or f"{plan.rules.space.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = settings.results_dir / name
    check_new_run(path)
    data = _load(settings, plan)
    with connected(settings.address):
        share = _share(settings, data)
        folder = RunFolder.create(path)
        with folder.only_writer():
            with writing(folder):
                plan.save(folder)
            return path, _run(folder, History(folder), plan, settings, share, data, epochs_of)


def _resume(settings: SearchSettings, path: Path, epochs_of: EpochSource) -> int:
    folder = RunFolder.open(path)
    with folder.only_writer():
        before = Plan.load(folder)
        plan = before.raised(settings)
        history = History.load(folder)
        if over := _why_nothing_is_left(plan, history):
            tell(f"{folder.path}: {over}")
            return 0
        for difference in before.differences(folder):
            tell(f"warning: since {folder.path} was last worked on, {difference}")
        data = _load(settings, plan)
        with connected(settings.address):
            share = _share(settings, data)
            with writing(folder):
                plan.save(folder)
            return _run(folder, history, plan, settings, share, data, epochs_of)


def _run(
    folder: RunFolder,
    history: History,
    plan: Plan,
    settings: SearchSettings,
    share: Share,
    data: Split,
    epochs_of: EpochSource,
) -> int:
    with writing(folder):
        history.open_session({"trials": plan.rules.trials, "elapsed": history.elapsed})
    machinery = Machinery(
        share, settings.max_concurrent, settings.retries, settings.hang_timeout, epochs_of
    )
    console = Console()
    at_once = min(share.slots(), settings.max_concurrent or share.slots())
    console.print(start_line(folder, plan.rules, history, share, at_once, data))
    with Progress(console) as progress:
        ending = run_session(folder, history, plan.rules, machinery, data, progress)
    console.print(summary(folder, history, plan.rules.metric, epochs=plan.rules.epochs))
    if ending.study_failure:
        tell(
            f"warning: {folder.study} is behind ({ending.study_failure}); nothing is lost: "
            f"--resume {folder.path} brings it up to date"
        )
    if ending.signal:
        tell(f"interrupted; go on with: python -m tune_mnist.search --resume {folder.path}")
        return 128 + ending.signal
    return 0


def _load(settings: SearchSettings, plan: Plan) -> Split:
    holdout = plan.rules.metric == "val_accuracy"
    return split(load_mnist(settings.data_dir), holdout=holdout, images=plan.images)


def _share(settings: SearchSettings, data: Split) -> Share:
    """Settle what one trial takes, and see that at least one fits.

    Raises:
        ClusterError: no node has that much.
    """
    if settings.pack == "auto":
        return _tried_share(data)
    nodes = node_resources()
    gpus = settings.gpus_per_trial
    if gpus is None:
        gpus = DEFAULT_GPU_SHARE if any(node.get("GPU") for node in nodes) else 0.0
    share = Share(cpus=settings.cpus_per_trial, gpus=gpus)
    if share.slots() == 0:
        offers = "; ".join(
            f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes
        )
        raise ClusterError(
            f"no machine can run a trial of {share.cpus:g} CPUs and {share.gpus:g} GPUs: there "
            f"is {offers}; ask for less with --cpus-per-trial or --gpus-per-trial"
        )
    return share


def _tried_share(data: Split) -> Share:
    """Try what serves the machine best, and say so."""

    def say(probe: Probe) -> None:
        tell(f"pack: {probe.packing}: {probe.epochs_per_hour:,.0f} epochs an hour")

    best = best_of(probe_all(largest_node(), data, PACK_SECONDS, say))
    tell(f"pack: {best.packing} it is; without trying: {best.packing.options()}")
    return best.packing.share


def _why_nothing_is_left(plan: Plan, history: History) -> str | None:
    """Say why there is nothing to resume, or return None."""
    if history.closed_as is None:  # killed: its tables are to be brought up to date at least
        return None
    if len(history.trials) >= plan.rules.trials and not history.unfinished():
        return f"all {plan.rules.trials} trials are finished; --trials N with a larger N adds more"
    if history.elapsed >= plan.rules.time_budget:
        return (
            f"the time budget of {duration(plan.rules.time_budget)} is used up; "
            "--time-budget with a longer time goes on"
        )
    return None
