"""What the machines of a cluster have room for."""

import pytest

from tune_mnist.errors import ClusterError
from tune_mnist.tuning import resources
from tune_mnist.tuning.resources import COUNT_EVERY, Node, Room, TrialResources, in_words


def node(cpus: float, gpus: float = 0.0) -> Node:
    return Node("id", cpus, gpus, 64_000.0, "10.0.0.1")


@pytest.mark.parametrize(
    ("cpus", "gpus", "machine", "fits"),
    [
        (1, 0, node(4), 4),
        (2, 0, node(5), 2),
        (0.5, 0, node(2), 4),
        (1, 0, node(0), 0),
        (1, 0.25, node(16, 1), 4),
        (1, 0.25, node(2, 1), 2),
        (1, 0.4, node(16, 2), 4),  # two on each: a trial uses one GPU's part
        (1, 2, node(16, 5), 2),
        (0, 0.5, node(1, 2), 4),
        (1, 0.25, node(16), 0),
    ],
)
def test_a_node_takes_as_many_trials_as_fit(
    cpus: float, gpus: float, machine: Node, fits: int
) -> None:
    assert TrialResources(cpus, gpus).slots_on(machine) == fits


def test_a_trial_takes_something() -> None:
    with pytest.raises(ClusterError, match="above 0"):
        TrialResources(0, 0)


class Growing:
    """A cluster that grows, and counts how often it is looked at."""

    def __init__(self) -> None:
        self.looks, self.nodes = 0, [node(4)]

    def __call__(self) -> list[Node]:
        self.looks += 1
        return self.nodes


def test_room_follows_the_cluster_without_asking_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster, now = Growing(), [0.0]
    monkeypatch.setattr(resources, "living_nodes", cluster)
    room = Room(TrialResources(cpus=1, gpus=0), None, clock=lambda: now[0])
    assert [room() for _ in range(5)] == [4] * 5
    assert cluster.looks == 1
    cluster.nodes.append(node(2))
    now[0] = COUNT_EVERY
    assert room() == 6


def test_room_is_at_most_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "living_nodes", Growing())
    assert Room(TrialResources(cpus=1, gpus=0), 3)() == 3
    assert Room(TrialResources(cpus=1, gpus=0), 9)() == 4


def test_what_a_machine_has_is_said_in_words() -> None:
    assert in_words(1, 0) == "1 CPU"
    assert in_words(4, 1) == "4 CPUs and 1 GPU"
    assert in_words(0.5, 0.25) == "0.5 CPU and 0.25 GPU"
    assert in_words(0, 0) == "0 CPUs"
