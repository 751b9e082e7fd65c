"""The machines of the connected cluster, and how many trials they have room for."""

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from tune_mnist.errors import ClusterError

COUNT_EVERY = 1.0  # seconds between two looks at which nodes there are
UNITS = 10_000  # of one CPU or GPU: Ray counts whole ones of these


def units(share: float) -> int:
    """Return a share of CPUs or GPUs as Ray counts it: one third of a GPU fits three times."""
    return round(UNITS * share)


def in_words(cpus: float, gpus: float) -> str:
    """Return `1 CPU`, `4 CPUs and 1 GPU`, `0.5 CPU and 0.25 GPU`."""

    def words(number: float, noun: str) -> str:
        return f"{number:g} {noun}{'' if 0 < number <= 1 else 's'}"

    return f"{words(cpus, 'CPU')} and {words(gpus, 'GPU')}" if gpus else words(cpus, "CPU")


@dataclass(frozen=True)
class Node:
    """A living machine of the cluster and what it offers."""

    id: str
    cpus: float
    gpus: float
    megabytes: float  # of memory for workers, by Ray's count
    address: str = ""

    def __str__(self) -> str:
        return in_words(self.cpus, self.gpus)


def living_nodes() -> list[Node]:
    """Return the connected cluster's machines, by their addresses."""
    nodes = (
        Node(
            id=node["NodeID"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            megabytes=node["Resources"].get("memory", math.inf) / 1e6,
            address=node["NodeManagerAddress"],
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    )
    return sorted(nodes, key=lambda node: node.address)


@dataclass(frozen=True)
class TrialResources:
    """The part of a machine that one trial takes."""

    cpus: float
    gpus: float

    def __post_init__(self) -> None:
        if self.cpus <= 0 and self.gpus <= 0:
            raise ClusterError("--cpus-per-trial must be above 0 where no GPU is used")

    def __str__(self) -> str:
        return in_words(self.cpus, self.gpus)

    def slots_on(self, node: Node) -> int:
        """Return how many trials fit on one node; a trial uses one GPU or a part of one."""
        fits = []
        if self.cpus > 0:
            fits.append(units(node.cpus) // units(self.cpus))
        if self.gpus > 0:
            fits.append(int(node.gpus) * (UNITS // units(self.gpus)))
        return min(fits)

    def at_once(self, nodes: Sequence[Node], most: int | None) -> int:
        """Return how many trials run at a time on the nodes, `most` at most."""
        slots = sum(map(self.slots_on, nodes))
        return min(slots, most or slots)


class Room:
    """How many trials may run at once, on the cluster as it was a moment ago.

    Tune asks after every report, and Ray takes 2 ms to answer.
    """

    def __init__(self, resources: TrialResources, max_concurrent: int | None) -> None:
        self._resources, self._max_concurrent = resources, max_concurrent
        self._count, self._due = 0, -math.inf

    def __call__(self) -> int:
        now = time.monotonic()
        if now >= self._due:
            self._count = self._resources.at_once(living_nodes(), self._max_concurrent)
            self._due = now + COUNT_EVERY
        return self._count


def resident_megabytes(process: int | str = "self") -> float:
    """Return a process's resident memory, or our own peak where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text("ascii").split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return pages * resource.getpagesize() / 1e6
