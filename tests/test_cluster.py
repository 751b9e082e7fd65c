"""What is said where no cluster answers."""

import contextlib
import socket
from pathlib import Path

import pytest
import ray

from tune_mnist.errors import ClusterError
from tune_mnist.tuning.cluster import connected


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


def test_a_ray_of_ones_own_has_no_web_server_to_wait_for() -> None:
    with connected(None):
        session = ray.get_runtime_context().get_session_name()
        (agent,) = [
            argument
            for command in Path("/proc").glob("[0-9]*/cmdline")
            for argument in arguments_of(command)
            if argument.startswith("--dashboard_agent_command=") and session in argument
        ]
    assert "--minimal" in agent.split()


def arguments_of(command: Path) -> list[str]:
    """Read a process's command, unless it has ended."""
    with contextlib.suppress(OSError):
        return command.read_text().split("\0")
    return []
