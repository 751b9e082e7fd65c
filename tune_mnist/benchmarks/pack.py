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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from tune_mnist.benchmarks.measurements import Measurements
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


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """Try 1, 2, 4 ... trials at once and say what --cpus-per-trial or --gpus-per-trial to use."""

    seconds: Annotated[float, Parameter(validator=Number(gt=0))] = 30.0
    """How long each packing is tried, in all its turns together."""

    rounds: Annotated[int, Parameter(validator=Number(gte=1))] = 3
    """Turns of each packing, one after the other."""

    quick: Annotated[bool, Parameter(negative="")] = False
    """One turn of five seconds."""

    address: Annotated[str | None, Parameter(show_default=False)] = None
    """A running Ray cluster, whose largest machine is tried. Without it, this machine."""

    save: Path | None = None
    """Write every number to this CSV file."""

    data_dir: Path | None = None
    """Folder of MNIST, `DIR/MNIST/raw`; one in your cache folder unless given."""


def pack(settings: PackSettings) -> None:
    """Measure and print."""
    data = split(load_mnist(settings.data_dir), holdout=True)
    rounds = 1 if settings.quick else settings.rounds
    seconds = 5.0 if settings.quick else settings.seconds / rounds
    taken = Measurements("pack")
    with connected(settings.address):
        node = largest_node()
        with cuda_mps(node, is_local=settings.address is None) as environment:
            for _ in range(rounds):
                measure(taken, node, data, seconds, environment)
        tried = packings(node)
    ways = ("", " (MPS)") if environment else ("",)
    finish(taken, tried, ways, settings.save)


def measure(
    taken: Measurements,
    node: Node,
    data: Split,
    seconds: float,
    environment: dict[str, str] | None,
) -> None:
    """Try each packing once, without MPS and, where it runs, with it."""
    for packing in packings(node):
        for way, variables in (("", None), (" (MPS)", environment)):
            if way and variables is None:
                continue
            probe = probe_packing(node, packing, data, seconds, variables)
            taken.add(f"{packing}{way}", "epochs_per_hour", probe.epochs_per_hour)
            taken.add(f"{packing}{way}", "mb_per_trial", probe.megabytes)


def finish(
    taken: Measurements, tried: list[Packing], ways: tuple[str, ...], save: Path | None
) -> None:
    """Print what was found and what to ask the search for."""
    found = {
        way: [
            Probe(
                packing,
                taken.median(f"{packing}{way}", "epochs_per_hour"),
                taken.median(f"{packing}{way}", "mb_per_trial"),
            )
            for packing in tried
        ]
        for way in ways
    }
    way, best = best_way(found)
    daemon = f"with {MPS} running, " if way else ""
    tell(f"best: {best.packing}: {daemon}python -m tune_mnist.search {best.packing.options()}")
    keys: dict[str, Any] = {
        "at_once": best.packing.at_once,
        "cpus_per_trial": best.packing.resources.cpus,
        "gpus_per_trial": best.packing.resources.gpus,
        "mps": bool(way),
        "epochs_per_hour": _by_count(found[""], "epochs_per_hour"),
        "mb_per_trial": _by_count(found[""], "megabytes"),
        "epochs_per_hour_mps": None,
    }
    if len(ways) > 1:
        keys["epochs_per_hour_mps"] = _by_count(found[ways[1]], "epochs_per_hour")
    taken.finish(keys, save)


def best_way(found: Mapping[str, list[Probe]]) -> tuple[str, Probe]:
    """Return the best of all packings and its way; plain, unless another is clearly better."""
    best = {way: best_of(probes) for way, probes in found.items()}
    way = max(best, key=lambda each: best[each].epochs_per_hour)
    plain = best[""].epochs_per_hour >= AS_GOOD * best[way].epochs_per_hour
    return ("", best[""]) if plain else (way, best[way])


def _by_count(probes: list[Probe], name: str) -> dict[str, float]:
    return {str(probe.packing.at_once): getattr(probe, name) for probe in probes}


@contextmanager
def cuda_mps(node: Node, *, is_local: bool) -> Iterator[dict[str, str] | None]:
    """Run CUDA's MPS daemon as this user, beside any other; no setting of the card is touched.

    Yields the variables that processes find it by, or None where there is no GPU or it cannot be
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
        environment = os.environ | variables
        try:
            subprocess.run(
                [MPS, "-d"], env=environment, check=True, capture_output=True, timeout=MPS_PATIENCE
            )
        except (OSError, subprocess.SubprocessError) as error:
            tell(f"MPS: skipped, it could not be started ({error})")
            yield None
            return
        try:
            yield variables
        finally:
            with suppress(subprocess.TimeoutExpired):  # it ends with the last process that uses it
                subprocess.run(
                    [MPS],
                    input=b"quit\n",
                    env=environment,
                    check=False,
                    capture_output=True,
                    timeout=MPS_PATIENCE,
                )
