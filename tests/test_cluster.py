"""How many trials fit, and what is said where no cluster answers."""

import socket

import pytest

from tune_mnist.errors import ClusterError
from tune_mnist.tuning.cluster import Share, connected


@pytest.mark.parametrize(
    ("cpus", "gpus", "node", "fits"),
    [
        (1, 0, {"CPU": 4.0}, 4),
        (2, 0, {"CPU": 5.0}, 2),
        (0.5, 0, {"CPU": 2.0}, 4),
        (1, 0, {}, 0),
        (1, 0.25, {"CPU": 16.0, "GPU": 1.0}, 4),
        (1, 0.25, {"CPU": 2.0, "GPU": 1.0}, 2),
        (1, 0.4, {"CPU": 16.0, "GPU": 2.0}, 4),  # two on each: a trial uses one GPU's part
        (1, 2, {"CPU": 16.0, "GPU": 5.0}, 2),
        (0, 0.5, {"CPU": 1.0, "GPU": 2.0}, 4),
        (1, 0.25, {"CPU": 16.0}, 0),
    ],
)
def test_a_node_takes_as_many_trials_as_fit(
    cpus: float, gpus: float, node: dict[str, float], fits: int
) -> None:
    assert Share(cpus, gpus).slots_of(node) == fits


def test_a_trial_takes_something() -> None:
    with pytest.raises(ClusterError, match="above 0"):
        Share(0, 0)


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
