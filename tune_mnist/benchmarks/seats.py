"""Many trials at once on a machine that has no room for as many workers.

A worker is a process of 100 MB and more. Here three of them, one on each node, stand in for all:
each seats a share of the trials. To Tune every seat is a trial's own actor, and calls travel as
they do to a real one, from process to process and from one node's object store to another's.
"""

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_mnist.benchmarks.sources import Trivial
from tune_mnist.mnist.data import Split
from tune_mnist.runs.history import Assignment
from tune_mnist.tuning.ray_patches import actors_replaced
from tune_mnist.tuning.worker import TrialEpoch, report_of


class Mark(NamedTuple):
    """When the driver told a trial to train another epoch."""

    epoch: int
    time: float  # seconds, on a clock of its own
    processor_time: float  # seconds that the driver had computed for by then


class Host:
    """What runs in the worker of a node: the trials of its seats."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._trials: dict[int, Iterator[TrialEpoch]] = {}
        self._is_open = asyncio.Event()

    async def begin(self, seat: int, assignment: Assignment) -> bool:
        """Give a seat to a trial."""
        self._trials[seat] = Trivial()(assignment, self._split)
        return True

    async def open(self) -> None:
        """Let all trials train."""
        self._is_open.set()

    async def train(self, seat: int) -> dict[str, Any]:
        """Report a trial's next epoch, with what Tune itself adds to it."""
        await self._is_open.wait()
        epoch = next(self._trials[seat])
        iteration = {"training_iteration": epoch.metrics.epoch, "time_total_s": 0.0}
        return {**report_of(epoch, epoch.model(), "val_accuracy"), **iteration}

    async def name(self) -> dict[str, Any]:
        """Say where it runs, as Tune asks of every worker."""
        return {"pid": os.getpid(), "node_ip": ray.util.get_node_ip_address()}  # type: ignore[no-untyped-call]

    async def end(self, seat: int) -> None:
        """Take a seat back."""
        self._trials.pop(seat, None)


class Seats:
    """Stands in for the class of Tune's actors, and notes how the driver keeps up."""

    def __init__(self, at_once: int, split: Split) -> None:
        self._at_once, self._split = at_once, split
        self._hosts: list[Any] = []
        self._taken = 0
        self._epochs: Counter[int] = Counter()  # by seat, that it was told to train
        self.marks: list[Mark] = []

    def remote(self, **kwargs: Any) -> SimpleNamespace:
        """Make what Tune takes for the handle of a trial's actor."""
        seat, self._taken = self._taken, self._taken + 1
        host = self._host(seat)

        def begin(config: dict[str, Any], **_: Any) -> Any:
            return host.begin.remote(seat, config["assignment"])

        def train() -> Any:
            future = host.train.remote(seat)
            self._epochs[seat] += 1
            self.marks.append(Mark(self._epochs[seat], time.perf_counter(), time.process_time()))
            if len(self.marks) == self._at_once:  # all have come; nobody is early
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

    def _host(self, seat: int) -> Any:
        if not self._hosts:
            for node in ray.nodes():  # type: ignore[no-untyped-call]
                actor = ray.remote(Host).options(
                    num_cpus=0,
                    max_concurrency=self._at_once + 1,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                )
                self._hosts.append(actor.remote(self._split))
        return self._hosts[seat % len(self._hosts)]


@contextlib.contextmanager
def seated(at_once: int, split: Split) -> Iterator[Seats]:
    """Have Tune's trials take seats, which all begin to train once `at_once` are taken."""
    seats = Seats(at_once, split)
    with actors_replaced(seats):
        yield seats
