"""`bench cluster`: how many reports a second one driver handles, from how many trials at once.

Three nodes run on this machine, each declared with as many CPUs as it needs. Their trials train
nothing and report what real ones do: the measured rate is the most that the driver, Tune and Ray
handle together. A search whose trials report more often waits for its driver.

A worker is a process of 100 MB and more, too much for one per trial on one machine. One process on
each node therefore stands in for the node's workers and seats a share of the trials. To Tune every
seat is a trial's own actor, and calls travel as they do to a real one, from process to process and
from one node's object store to another's.
"""

import asyncio
import contextlib
import io
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_mnist.benchmarks.measurements import Measurements
from tune_mnist.benchmarks.settings import ClusterSettings
from tune_mnist.benchmarks.watched import Trivial
from tune_mnist.cli import tell
from tune_mnist.errors import TuneMnistError
from tune_mnist.host import scratch
from tune_mnist.mnist.data import Split, load_mnist, split
from tune_mnist.runs.history import Assignment
from tune_mnist.tuning.launch import search
from tune_mnist.tuning.ray_patches import NO_WORKERS_AHEAD, actors_replaced
from tune_mnist.tuning.settings import SearchSettings
from tune_mnist.tuning.worker import TrialEpoch, report_of

NODES = 3
MIN_EPOCHS = 4  # of a trial
EPOCH_SECONDS = (0.4, 24.0)  # of a full-size epoch: several trials on one GPU; one CPU core
QUANTITIES = ("reports_per_second", "ms_per_report", "driver_ms_per_report")


def cluster(settings: ClusterSettings) -> None:
    measured = Measurements("cluster")
    reports, rounds = (400, 1) if settings.quick else (settings.reports, settings.rounds)
    subjects = {size: f"{size} trials at once" for size in settings.at_once}
    for turn in range(rounds):
        for at_once, subject in subjects.items():
            tell(f"round {turn + 1} of {rounds}: {subject}")
            found = measure(at_once, max(MIN_EPOCHS, reports // at_once))
            for quantity, value in zip(QUANTITIES, found, strict=True):
                measured.add(subject, quantity, value)
    keys: dict[str, Any] = {
        quantity: {size: measured.median(subject, quantity) for size, subject in subjects.items()}
        for quantity in QUANTITIES
    }
    for rate in keys["reports_per_second"].values():
        fed = ", ".join(f"{rate * seconds:,.0f} of {seconds:g} s" for seconds in EPOCH_SECONDS)
        tell(f"{rate:.0f} reports a second keep up with so many trials, by epoch: {fed}")
    measured.finish(keys | {"nodes": NODES}, settings.save)


def measure(at_once: int, epochs: int) -> tuple[float, float, float]:
    """Return the QUANTITIES of a search whose trials all report that many epochs.

    Raises TuneMnistError if the search fails.
    """
    with three_nodes(at_once) as (address, folder):
        asked = SearchSettings(
            space="sgd",
            trials=at_once,
            epochs=epochs,
            grace_epochs=epochs,
            startup_trials=at_once,  # `bench turnaround` measures what a proposal takes
            images=200,
            address=address,
            results_dir=folder,
            run="run",
            report=False,
        )
        seats = Seats(at_once, split(load_mnist(), holdout=True, images=asked.images))
        said = io.StringIO()
        with actors_replaced(seats), contextlib.redirect_stdout(said):
            code = search(asked)
        if code != 0:
            raise TuneMnistError(f"the search ended with {code}: {said.getvalue()[-500:]}")
    wall, computing, reports = steady(seats.marks, at_once, epochs)
    return reports / wall, 1e3 * wall / reports, 1e3 * computing / reports


class Mark(NamedTuple):
    """When the driver told a trial to train another epoch."""

    epoch: int
    time: float  # s, of a clock of its own
    processor_time: float  # of the driver's processor until then, s


def steady(marks: list[Mark], at_once: int, epochs: int) -> tuple[float, float, int]:
    """Return seconds, the driver's processor seconds and reports, while all trials ran.

    That is from when the last of them began until the first was told to train its last epoch.
    """
    first = at_once - 1
    last = next(at for at, mark in enumerate(marks) if mark.epoch == epochs)
    wall = marks[last].time - marks[first].time
    computing = marks[last].processor_time - marks[first].processor_time
    return wall, computing, last - first


@contextlib.contextmanager
def three_nodes(at_once: int) -> Iterator[tuple[str, Path]]:
    """Start a cluster with a CPU for each trial; yields its address and a folder."""
    with scratch() as folder:
        cpus = math.ceil(at_once / NODES)
        node: dict[str, Any] = {"num_cpus": cpus, "object_store_memory": 300 << 20}
        head = {"include_dashboard": False, "temp_dir": str(folder), **NO_WORKERS_AHEAD}
        nodes = Cluster(initialize_head=True, head_node_args=node | head)
        try:
            for _ in range(NODES - 1):
                nodes.add_node(**node)
            yield nodes.address, folder / "results"
        finally:
            nodes.shutdown()  # type: ignore[no-untyped-call]


class Host:
    """The actor on a node: the trials of its seats."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._trials: dict[int, Iterator[TrialEpoch]] = {}
        self._is_open = asyncio.Event()

    async def begin(self, seat: int, assignment: Assignment) -> bool:
        self._trials[seat] = Trivial()(assignment, self._split)
        return True

    async def open(self) -> None:
        self._is_open.set()

    async def train(self, seat: int) -> dict[str, Any]:
        await self._is_open.wait()
        epoch = next(self._trials[seat])
        # What Tune itself adds to a report.
        iteration = {"training_iteration": epoch.metrics.epoch, "time_total_s": 0.0}
        return {**report_of(epoch, epoch.model(), "val_accuracy"), **iteration}

    async def name(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "node_ip": ray.util.get_node_ip_address()}  # type: ignore[no-untyped-call]

    async def end(self, seat: int) -> None:
        self._trials.pop(seat, None)


class Seats:
    """Replaces the class of Tune's actors and records when the driver tells them to train.

    The trials all begin to train once `at_once` seats are taken.
    """

    def __init__(self, at_once: int, split: Split) -> None:
        self._at_once, self._split = at_once, split
        self._taken = 0
        self._epochs: Counter[int] = Counter()  # by seat, those it was told to train
        self.marks: list[Mark] = []

    def remote(self, **kwargs: Any) -> SimpleNamespace:
        """Return what Tune uses as the handle of a trial's actor."""
        seat, self._taken = self._taken, self._taken + 1
        host = self._hosts[seat % NODES]

        def begin(config: dict[str, Any], **_: Any) -> Any:
            return host.begin.remote(seat, config["assignment"])

        def train() -> Any:
            future = host.train.remote(seat)
            self._epochs[seat] += 1
            self.marks.append(Mark(self._epochs[seat], time.perf_counter(), time.process_time()))
            if len(self.marks) == self._at_once:  # all trials are seated: none starts early
                ray.get([each.open.remote() for each in self._hosts])
            return future

        calls: dict[str, Callable[..., Any]] = {
            "__ray_ready__": lambda: begin(kwargs["config"]),
            "reset": begin,
            "train": train,
            "stop": lambda: host.end.remote(seat),
            "get_auto_filled_metrics": lambda **_: host.name.remote(),
            "__ray_terminate__": lambda: host.end.remote(seat),
        }
        return SimpleNamespace(
            **{name: SimpleNamespace(remote=call) for name, call in calls.items()}
        )

    @cached_property
    def _hosts(self) -> list[Any]:
        """An actor on each node; Ray is connected once Tune asks for the first seat."""
        return [
            ray.remote(Host)
            .options(
                num_cpus=0,
                max_concurrency=self._at_once + 1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote(self._split)
            for node in ray.nodes()  # type: ignore[no-untyped-call]
        ]
