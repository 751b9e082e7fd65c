"""What is said where no cluster answers."""

import socket

import pytest

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
