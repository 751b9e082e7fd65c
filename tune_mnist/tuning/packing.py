"""How many trials at once, and so what each of them takes: as asked, or as tried for seconds.

`--pack auto` tries one trial on all cores, two on half of them each, four ...: small nets leave
more of a processor idle the more threads one of them is given, and one of them fills no GPU.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_mnist.cli import tell
from tune_mnist.errors import ClusterError
from tune_mnist.mnist.config import Precision, TrainConfig, check_precision
from tune_mnist.mnist.data import Split
from tune_mnist.runs.formatting import count
from tune_mnist.tuning.resources import (
    Node,
    TrialResources,
    living_nodes,
    resident_megabytes,
)
from tune_mnist.tuning.settings import RunOn

DEFAULT_GPU_SHARE = 0.25
PACK_SECONDS = 5.0  # that each packing is tried
PART_ON_CPU = 16  # an epoch there takes half a minute: one of so many parts is tried
WORSE = 0.95  # a packing this much below the best so far: still tighter ones are not tried
AS_GOOD = 0.97  # of two packings this close, the one with fewer trials at once is taken
MEMORY_SHARE = 0.9  # of a node's memory, at most


def settle_resources(settings: RunOn, data: Split, precision: Precision) -> TrialResources:
    """Return what one trial takes.

    Raises ClusterError if no node has that much, and ConfigError if the precision asked for is a
    GPU's and a trial takes none.
    """
    resources = _tried(data) if settings.pack == "auto" else _asked(settings)
    if not resources.gpus:
        check_precision(precision, "cpu")
    return resources


def _asked(settings: RunOn) -> TrialResources:
    nodes = living_nodes()
    gpus = settings.gpus_per_trial
    if gpus is None:
        gpus = DEFAULT_GPU_SHARE if any(node.gpus for node in nodes) else 0.0
    resources = TrialResources(cpus=settings.cpus_per_trial, gpus=gpus)
    if not any(map(resources.slots_on, nodes)):
        alike = Counter(map(str, nodes)).most_common()
        offers = ", ".join(f"{count(number, 'node')} of {each}" for each, number in alike)
        raise ClusterError(
            f"no node can run a trial of {resources}: there is {offers}; "
            "ask for less with --cpus-per-trial or --gpus-per-trial"
        )
    return resources


def _tried(data: Split) -> TrialResources:
    probes = []
    for probe in probe_all(largest_node(), data):
        tell(f"pack: {probe.packing}: {probe.epochs_per_hour:,.0f} epochs an hour")
        probes.append(probe)
    best = best_of(probes).packing
    tell(f"pack: {best} it is; without trying: {best.options()}")
    return best.resources


@dataclass(frozen=True)
class Packing:
    """So many trials at once on a node, and what each takes."""

    at_once: int
    resources: TrialResources

    def __str__(self) -> str:
        return f"{count(self.at_once, 'trial')} on {self.resources}{' each' * (self.at_once > 1)}"

    def options(self) -> str:
        """Return the search command's options for it."""
        options = f"--cpus-per-trial {self.resources.cpus:g}"
        if self.resources.gpus:
            options += f" --gpus-per-trial {self.resources.gpus:g}"
        return options


@dataclass(frozen=True)
class Probe:
    """What a packing achieved."""

    packing: Packing
    epochs_per_hour: float  # full-size epochs with their evaluation, of all trials at once
    megabytes: float  # a trial holds: of the GPU's memory where there is one, else resident


def largest_node() -> Node:
    """Return the node with the most GPUs, else CPUs; raise ClusterError if none has a CPU."""
    node = max(living_nodes(), key=lambda each: (each.gpus, each.cpus), default=None)
    if node is None or node.cpus < 1:
        raise ClusterError("no machine of the cluster has a whole CPU: there is nothing to try")
    return node


def packings(node: Node) -> list[Packing]:
    """Return the packings to try on a node: 1, 2, 4 ... trials at once.

    With several GPUs, these are for one of them; each is used alike.
    """
    cpus = int(node.cpus)
    if node.gpus:
        cores = cpus / node.gpus  # for the trials of one GPU
        counts = [2**power for power in range(6) if 2**power <= 2 * cores] or [1]
        return [
            Packing(count, TrialResources(cpus=round(min(1.0, cores / count), 4), gpus=1 / count))
            for count in counts
        ]
    counts = sorted({2**power for power in range(cpus.bit_length())} | {cpus})
    return [Packing(count, TrialResources(float(cpus // count), gpus=0.0)) for count in counts]


def probe_all(node: Node, split: Split) -> Iterator[Probe]:
    """Try a node's packings from few trials to many, as long as more may still be better."""
    best = megabytes = 0.0
    for packing in packings(node):
        if not node.gpus and packing.at_once * megabytes > MEMORY_SHARE * node.megabytes:
            return
        probe = probe_packing(node, packing, split, PACK_SECONDS)
        yield probe
        best, megabytes = max(best, probe.epochs_per_hour), probe.megabytes
        if probe.epochs_per_hour < WORSE * best:
            return


def best_of(probes: Sequence[Probe]) -> Probe:
    """Return the one with the most epochs an hour; of near equals the one with fewer trials."""
    most = max(probe.epochs_per_hour for probe in probes)
    good = [probe for probe in probes if probe.epochs_per_hour >= AS_GOOD * most]
    return min(good, key=lambda probe: probe.packing.at_once)


def probe_packing(
    node: Node,
    packing: Packing,
    split: Split,
    seconds: float,
    environment: dict[str, str] | None = None,
) -> Probe:
    """Train so many trials at once for a while, in processes with these variables of their own."""
    resources = packing.resources
    worker: Any = ray.remote(_Trial).options(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        runtime_env={"env_vars": environment} if environment else None,
    )
    part = part_of(split, 1 if resources.gpus else PART_ON_CPU)
    data = ray.put(part)
    trials = [worker.remote(data, max(1, int(resources.cpus))) for _ in range(packing.at_once)]
    try:
        ray.get([trial.train_for.remote(0.0) for trial in trials])  # what only a first epoch takes
        found = ray.get([trial.train_for.remote(seconds) for trial in trials])
    finally:
        for trial in trials:
            ray.kill(trial)
    rate = sum(epochs / took for epochs, took, _ in found)
    rate *= len(part.train_labels) / len(split.train_labels)
    most = max(megabytes for _, _, megabytes in found)
    # On a GPU each sees what all of them hold there.
    return Probe(packing, 3600 * rate, most / packing.at_once if resources.gpus else most)


def part_of(split: Split, part: int) -> Split:
    """Return one of so many parts of each of a split's sets; two batches at least to train on."""
    first: dict[str, Any] = {}
    for name, array in vars(split).items():
        least = 256 if name.startswith("train") else 1
        first[name] = array[: max(len(array) // part, least)]
    return replace(split, **first)


class _Trial:
    """A process that trains the baseline."""

    def __init__(self, split: Split, threads: int) -> None:
        import torch

        from tune_mnist.mnist.training import train

        torch.set_num_threads(threads)
        self._on_gpu = torch.cuda.is_available()
        device = "cuda" if self._on_gpu else "cpu"
        # More epochs than any probe trains.
        self._results = train(TrainConfig(), split, epochs=1000, seed=0, device=device)

    def train_for(self, seconds: float) -> tuple[int, float, float]:
        """Train whole epochs, one at least; return how many, their seconds and megabytes held."""
        began, epochs, took = time.perf_counter(), 0, 0.0
        while epochs == 0 or took < seconds:
            next(self._results)
            epochs, took = epochs + 1, time.perf_counter() - began
        if not self._on_gpu:
            return epochs, took, resident_megabytes()
        import torch

        free, total = torch.cuda.mem_get_info()
        return epochs, took, (total - free) / 1e6
