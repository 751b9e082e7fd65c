"""What the machines of a cluster have room for."""

import time
from unittest.mock import Mock

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
        (1, 0.1, node(16, 1), 10),  # 1 // 0.1 is 9
        (0.1, 0, node(0.3), 3),  # and 0.3 // 0.1 is 2
        (1, 1 / 3, node(16, 1), 3),
        (1e-4, 0, node(2), 20_000),
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


@pytest.mark.parametrize(("asked_for", "before", "after"), [(None, 4, 6), (3, 3, 3), (5, 4, 5)])
def test_room_follows_the_cluster_up_to_what_was_asked_for_without_asking_each_time(
    monkeypatch: pytest.MonkeyPatch, asked_for: int | None, before: int, after: int
) -> None:
    now, living_nodes = [0.0], Mock(return_value=[node(4)])
    monkeypatch.setattr(resources, "living_nodes", living_nodes)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    room = Room(TrialResources(cpus=1, gpus=0), asked_for)
    assert [room() for _ in range(5)] == [before] * 5
    assert living_nodes.call_count == 1
    living_nodes.return_value = [node(4), node(2)]
    now[0] = COUNT_EVERY
    assert room() == after


@pytest.mark.parametrize(
    ("cpus", "gpus", "words"),
    [
        (1, 0, "1 CPU"),
        (4, 1, "4 CPUs and 1 GPU"),
        (0.5, 0.25, "0.5 CPU and 0.25 GPU"),
        (0, 0, "0 CPUs"),
    ],
)
def test_what_a_machine_has_is_said_in_words(cpus: float, gpus: float, words: str) -> None:
    assert in_words(cpus, gpus) == words
