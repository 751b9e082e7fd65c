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
from pathlib import Path

from tune_mnist.benchmarks.measurements import Measurements
from tune_mnist.benchmarks.settings import PackSettings
from tune_mnist.cli import tell
from tune_mnist.mnist.data import Split, load_mnist, split
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

Ways = Mapping[str, dict[str, str] | None]  # the variables that each gives its processes


def pack(settings: PackSettings) -> None:
    data = split(load_mnist(settings.data_dir), holdout=True)
    rounds = 1 if settings.quick else settings.rounds
    seconds = 5.0 if settings.quick else settings.seconds / rounds
    measured = Measurements("pack")
    with connected(settings.address):
        node = largest_node()
        with cuda_mps(node, is_local=settings.address is None) as variables:
            ways: Ways = {PLAIN: None} | ({UNDER_MPS: variables} if variables else {})
            for _ in range(rounds):
                measure(measured, node, data, seconds, ways)
    finish(measured, packings(node), ways, settings.save)


def measure(measured: Measurements, node: Node, data: Split, seconds: float, ways: Ways) -> None:
    """Try each packing once, in each way."""
    for packing in packings(node):
        for way, variables in ways.items():
            probe = probe_packing(node, packing, data, seconds, variables)
            measured.add(f"{packing}{way}", "epochs_per_hour", probe.epochs_per_hour)
            measured.add(f"{packing}{way}", "mb_per_trial", probe.megabytes)


def finish(measured: Measurements, tried: list[Packing], ways: Ways, save: Path | None) -> None:
    """Print what was measured and the options that the search needs for the best."""
    found = {
        way: [
            Probe(
                packing,
                measured.median(f"{packing}{way}", "epochs_per_hour"),
                measured.median(f"{packing}{way}", "mb_per_trial"),
            )
            for packing in tried
        ]
        for way in ways
    }
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
    measured.finish(keys, save)


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
    if not node.gpus:
        tell("MPS: skipped, there is no GPU")
        yield None
        return
    if not is_local or shutil.which(MPS) is None:
        tell(f"MPS: skipped, {MPS} is not " + ("on this machine" if is_local else "ours to start"))
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="tune_mnist-mps-") as folder:
        variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        try:
            _control(variables, "-d")
        except (OSError, subprocess.SubprocessError) as error:
            tell(f"MPS: skipped, it could not be started ({error})")
            yield None
            return
        try:
            yield variables
        finally:
            with suppress(subprocess.SubprocessError):  # it ends with its last client
                _control(variables, order=b"quit\n")


def _control(variables: dict[str, str], *arguments: str, order: bytes | None = None) -> None:
    subprocess.run(
        [MPS, *arguments],
        input=order,
        env=os.environ | variables,
        check=True,
        capture_output=True,
        timeout=MPS_PATIENCE,
    )
