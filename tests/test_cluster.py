"""A Ray of one's own, and searches on a cluster whose machines do not have this package."""

import socket
import subprocess
import sys

import pytest

from tune_mnist.errors import ClusterError
from tune_mnist.tuning.cluster import connected

SHOW_AGENTS = """
import contextlib
from pathlib import Path
import ray
from tune_mnist.tuning.cluster import connected
with connected(None):
    session = ray.get_runtime_context().get_session_name()
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            for argument in command.read_text().split("\\0"):
                if argument.startswith("--dashboard_agent_command=") and session in argument:
                    print(argument)
"""


@pytest.mark.parametrize("address", ["nonsense", "host:", ":6379", "host:port"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="must be 'auto', HOST:PORT"), connected(address):
        pass


def test_an_address_that_nothing_answers_at_is_refused_within_seconds() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        refused = pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}")
        with refused, connected(address):
            pass


@pytest.mark.slow
def test_a_ray_of_ones_own_has_no_web_server_to_wait_for() -> None:
    # In a process of its own: Ray leaves its token in the environment of the one it starts in.
    asked = subprocess.run(
        [sys.executable, "-c", SHOW_AGENTS], stdout=subprocess.PIPE, text=True, check=True
    )
    assert "--minimal" in asked.stdout.split()
