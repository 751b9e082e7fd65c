"""A Ray head, started with `ray start` as people do."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

PATIENCE = 120.0  # seconds that anything may take
RAY = ("-m", "ray.scripts.scripts")


@contextlib.contextmanager
def ray_head(
    *options: str,
    ports: tuple[int, ...],
    environment: Mapping[str, str],
    python: Path | str = sys.executable,
) -> Iterator[None]:
    """Run a head with two CPUs that has this environment as well, and wait for its ports."""
    with tempfile.TemporaryDirectory(prefix="tm-ray-") as temp_dir:  # sockets need a short path
        command = [
            *(python, *RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"),
            *(f"--object-store-memory={300 << 20}", f"--temp-dir={temp_dir}", *options),
        ]
        process = subprocess.Popen(
            command,
            cwd=temp_dir,
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            for port in ports:
                wait_until(lambda port=port: answers(port), process)  # type: ignore[misc]
            yield
        finally:
            process.terminate()  # which ends what it has started
            process.wait(PATIENCE)


def free_ports(number: int) -> tuple[int, ...]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return tuple(each.getsockname()[1] for each in sockets)


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until(holds: Callable[[], bool], *processes: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline or any(each.poll() is not None for each in processes):
            pytest.fail("waited in vain")
        time.sleep(0.05)
