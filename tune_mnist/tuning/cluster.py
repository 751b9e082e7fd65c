"""Ray: start one on this machine or join a running one, and count how many trials fit."""

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ray

from tune_mnist.errors import ClusterError

CONNECT_PATIENCE = 5.0  # seconds for a cluster's port to answer
COUNT_EVERY = 1.0  # seconds between two looks at which nodes there are


@dataclass(frozen=True)
class Share:
    """What one trial takes of the machines."""

    cpus: float
    gpus: float

    def __post_init__(self) -> None:
        if self.cpus <= 0 and self.gpus <= 0:
            raise ClusterError("--cpus-per-trial must be above 0 where no GPU is used")

    def slots(self) -> int:
        """Return how many trials fit on the cluster as it is now."""
        return sum(map(self.slots_of, node_resources()))

    def slots_of(self, resources: dict[str, float]) -> int:
        """Return how many trials fit on one node; a trial uses a part of one GPU or whole ones."""
        fits = math.inf
        if self.cpus > 0:
            fits = resources.get("CPU", 0.0) // self.cpus
        if self.gpus > 0:
            gpus = resources.get("GPU", 0.0)
            by_gpu = gpus // self.gpus if self.gpus >= 1 else gpus * (1 // self.gpus)
            fits = min(fits, by_gpu)
        return int(fits)


class Room:
    """How many trials may be under way at once, on the cluster as it was a moment ago.

    Tune asks after every report, and an answer from Ray takes 2 ms.
    """

    def __init__(
        self,
        share: Share,
        max_concurrent: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._share, self._max_concurrent, self._clock = share, max_concurrent, clock
        self._count, self._due = 0, -math.inf

    def __call__(self) -> int:
        """Return the number of trials."""
        now = self._clock()
        if now >= self._due:
            slots = self._share.slots()
            self._count = min(slots, self._max_concurrent or slots)
            self._due = now + COUNT_EVERY
        return self._count


def node_resources() -> list[dict[str, float]]:
    """Return what each living node of the connected cluster offers, such as CPU and GPU."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Start Ray on this machine, or join the cluster at `address`, for as long as it is needed.

    Raises:
        ClusterError: nothing answers at the address, or it is not a cluster one can join.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray prints 900 characters about every worker that dies, with log_to_driver or without: right
    # into a live view. What befell a trial is in its reason.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    if address is None:
        _start()
    else:
        _join(address)
    try:
        yield
    finally:
        ray.shutdown()


def _start() -> None:
    ray.init(
        address="local",
        include_dashboard=False,
        _node_ip_address="127.0.0.1",  # nobody else's business
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _join(address: str) -> None:
    _check_port(address)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        raise ClusterError(
            f"cannot join the Ray cluster at {address}: {' '.join(str(error).split())[:300]}"
        ) from error


def _check_port(address: str) -> None:
    """Fail within seconds where nothing answers; Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(
            f"--address must be 'auto', HOST:PORT or ray://HOST:PORT, got {address}"
        )
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_PATIENCE).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}): "
            "start one with `ray start --head`, or leave --address out to run on this machine"
        ) from error
