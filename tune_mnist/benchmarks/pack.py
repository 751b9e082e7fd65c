"""`bench pack`: how many trials at once serve this machine best.

Every packing is tried in turns, and with a GPU also under CUDA MPS, which lets processes compute
on it at the same time instead of taking turns.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product

from tune_mnist.benchmarks.measurements import Measurements
from tune_mnist.benchmarks.settings import PackSettings
from tune_mnist.cli import tell
from tune_mnist.mnist.data import load_mnist, split
from tune_mnist.tuning.cluster import connected
from tune_mnist.tuning.packing import (
    AS_GOOD,
    Packing,
    Probe,
    best_of,
    largest_node,
    packings,
    probe_packing,
)
from tune_mnist.tuning.resources import Node

MPS = "nvidia-cuda-mps-control"
MPS_PATIENCE = 10.0  # seconds that its daemon may take to start, and to end
PLAIN, UNDER_MPS = "", " (MPS)"  # what a packing's name ends with


def pack(settings: PackSettings) -> None:
    data = split(load_mnist(settings.data_dir), holdout=True)
    rounds = 1 if settings.quick else settings.rounds
    seconds = 5.0 if settings.quick else settings.seconds / rounds
    measured = Measurements("pack")
    with connected(settings.address):
        node = largest_node()
        with cuda_mps(node, is_local=settings.address is None) as variables:
            ways = {PLAIN: None} | ({UNDER_MPS: variables} if variables else {})
            for _, packing, way in product(range(rounds), packings(node), ways):
                probe = probe_packing(node, packing, data, seconds, ways[way])
                measured.add(f"{packing}{way}", "epochs_per_hour", probe.epochs_per_hour)
                measured.add(f"{packing}{way}", "mb_per_trial", probe.megabytes)
    found = {way: [median_probe(measured, each, way) for each in packings(node)] for way in ways}
    way, best = best_way(found)
    daemon = f"with {MPS} running, " if way else ""
    tell(f"best: {best.packing}: {daemon}python -m tune_mnist.search {best.packing.options()}")
    rates = {
        way: {str(each.packing.at_once): each.epochs_per_hour for each in probes}
        for way, probes in found.items()
    }
    keys = {
        "at_once": best.packing.at_once,
        "cpus_per_trial": best.packing.resources.cpus,
        "gpus_per_trial": best.packing.resources.gpus,
        "mps": way == UNDER_MPS,
        "epochs_per_hour": rates[PLAIN],
        "mb_per_trial": {str(each.packing.at_once): each.megabytes for each in found[PLAIN]},
        "epochs_per_hour_mps": rates.get(UNDER_MPS),
    }
    measured.finish(keys, settings.save)


def median_probe(measured: Measurements, packing: Packing, way: str) -> Probe:
    median = partial(measured.median, f"{packing}{way}")
    return Probe(packing, median("epochs_per_hour"), median("mb_per_trial"))


def best_way(found: Mapping[str, list[Probe]]) -> tuple[str, Probe]:
    """Return the best of all packings and its way; plain, unless another is clearly better."""
    best = {way: best_of(probes) for way, probes in found.items()}
    way = max(best, key=lambda each: best[each].epochs_per_hour)
    if best[PLAIN].epochs_per_hour >= AS_GOOD * best[way].epochs_per_hour:
        way = PLAIN
    return way, best[way]


@contextmanager
def cuda_mps(node: Node, *, is_local: bool) -> Iterator[dict[str, str] | None]:
    """Run CUDA's MPS daemon as this user, beside any other; the card's settings stay as they are.

    Yields the variables by which processes find it, or None where there is no GPU or it cannot be
    started.
    """
    with tempfile.TemporaryDirectory(prefix="tune_mnist-mps-") as folder:
        variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        if reason := _cannot_start(variables, node, is_local):
            tell(f"MPS: skipped, {reason}")
            yield None
            return
        try:
            yield variables
        finally:
            with suppress(subprocess.SubprocessError):  # it ends with its last client
                _control(variables, order=b"quit\n")


def _cannot_start(variables: dict[str, str], node: Node, is_local: bool) -> str | None:
    """Start the daemon, or return why it cannot be."""
    if not node.gpus:
        return "there is no GPU"
    if not is_local:
        return f"{MPS} is not ours to start"
    if shutil.which(MPS) is None:
        return f"{MPS} is not on this machine"
    try:
        _control(variables, "-d")
    except (OSError, subprocess.SubprocessError) as error:
        return f"it could not be started ({error})"
    return None


def _control(variables: dict[str, str], *arguments: str, order: bytes | None = None) -> None:
    subprocess.run(
        [MPS, *arguments],
        input=order,
        env=os.environ | variables,
        check=True,
        capture_output=True,
        timeout=MPS_PATIENCE,
    )
