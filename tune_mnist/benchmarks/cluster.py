"""`bench cluster`: how many reports a second one driver takes in, from how many trials at once.

Three nodes on this machine, each with as many CPUs as it is said to have, and trials that train
nothing and report what real ones do: the most that they report is the most that the driver and
all that is between can take. A search whose trials report more often than that waits for it.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from ray.cluster_utils import Cluster

from tune_mnist.benchmarks.measurements import Measurements
from tune_mnist.benchmarks.seats import Mark, seated
from tune_mnist.cli import tell
from tune_mnist.errors import TuneMnistError
from tune_mnist.mnist.data import load_mnist, split
from tune_mnist.tuning.launch import search
from tune_mnist.tuning.ray_patches import NO_WORKERS_AHEAD
from tune_mnist.tuning.settings import SearchSettings

NODES = 3
MIN_EPOCHS = 4  # of a trial
EPOCH_SECONDS = (0.4, 24.0)  # of a full-size epoch: several trials on one GPU; one CPU core


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """Measure how reports per second hold up with many trials at once on three nodes."""

    at_once: tuple[Annotated[int, Parameter(validator=Number(gte=1))], ...] = (8, 64, 256)
    """Trials at once, one search after another."""

    reports: Annotated[int, Parameter(validator=Number(gte=40))] = 2000
    """Reports of a search, about."""

    rounds: Annotated[int, Parameter(validator=Number(gte=1))] = 3
    """Times that each is measured."""

    quick: Annotated[bool, Parameter(negative="")] = False
    """One round of 400 reports."""

    save: Path | None = None
    """Write every number to this CSV file."""


def cluster(settings: ClusterSettings) -> None:
    """Measure and print."""
    taken = Measurements("cluster")
    reports, rounds = (400, 1) if settings.quick else (settings.reports, settings.rounds)
    for turn in range(rounds):
        for at_once in settings.at_once:
            tell(f"round {turn + 1} of {rounds}: {at_once} trials at once")
            measure(taken, at_once, max(MIN_EPOCHS, reports // at_once))
    for at_once in settings.at_once:
        rate = taken.median(_subject(at_once), "reports_per_second")
        fed = ", ".join(f"{rate * seconds:,.0f} of {seconds:g} s" for seconds in EPOCH_SECONDS)
        tell(f"{rate:.0f} reports a second keep up with so many trials, by epoch: {fed}")
    taken.finish(_keys(taken, settings.at_once), settings.save)


def measure(taken: Measurements, at_once: int, epochs: int) -> None:
    """Search with so many trials, all of which report that many epochs.

    Raises:
        TuneMnistError: the search failed.
    """
    with three_nodes(at_once) as (address, folder):
        asked = SearchSettings(
            space="sgd",
            trials=at_once,
            epochs=epochs,
            grace_epochs=epochs,
            startup_trials=at_once,  # what a proposal takes is another part's
            images=200,
            address=address,
            results_dir=folder,
            run="run",
            report=False,
        )
        data = split(load_mnist(), holdout=True, images=asked.images)
        said = io.StringIO()
        with seated(at_once, data) as seats, contextlib.redirect_stdout(said):
            code = search(asked)
        if code != 0:
            raise TuneMnistError(f"the search ended with {code}: {said.getvalue()[-500:]}")
    wall, computing, reports = steady(seats.marks, at_once, epochs)
    taken.add(_subject(at_once), "reports_per_second", reports / wall)
    taken.add(_subject(at_once), "ms_per_report", 1e3 * wall / reports)
    taken.add(_subject(at_once), "driver_ms_per_report", 1e3 * computing / reports)


def steady(marks: list[Mark], at_once: int, epochs: int) -> tuple[float, float, int]:
    """Return seconds, the driver's processor seconds and reports, while all trials were there.

    That is from when the last of them began until the first was told to train its last epoch.
    """
    first = at_once - 1
    last = next(at for at, mark in enumerate(marks) if mark.epoch == epochs)
    wall = marks[last].time - marks[first].time
    computing = marks[last].processor_time - marks[first].processor_time
    return wall, computing, last - first


@contextlib.contextmanager
def three_nodes(at_once: int) -> Iterator[tuple[str, Path]]:
    """Start a cluster with room for so many trials; yields its address and a folder."""
    with tempfile.TemporaryDirectory(prefix="tm-ray-") as name:  # sockets need a short path
        cpus, store = -(-at_once // NODES), 300 << 20
        head = {
            "num_cpus": cpus,
            "object_store_memory": store,
            "include_dashboard": False,
            "temp_dir": name,
            **NO_WORKERS_AHEAD,
        }
        nodes = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(NODES - 1):
                nodes.add_node(num_cpus=cpus, object_store_memory=store)
            yield nodes.address, Path(name) / "results"
        finally:
            nodes.shutdown()  # type: ignore[no-untyped-call]


def _subject(at_once: int) -> str:
    return f"{at_once} trials at once"


def _keys(taken: Measurements, sizes: tuple[int, ...]) -> dict[str, Any]:
    quantities = ("reports_per_second", "ms_per_report", "driver_ms_per_report")
    return {
        quantity: {size: taken.median(_subject(size), quantity) for size in sizes}
        for quantity in quantities
    } | {"nodes": NODES}
