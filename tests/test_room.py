import pytest

from tune_mnist.tuning import cluster
from tune_mnist.tuning.cluster import COUNT_EVERY, Room, Share


class Nodes:
    """A cluster that grows, and counts how often it is looked at."""

    def __init__(self) -> None:
        self.looks, self.cpus = 0, 4.0

    def __call__(self) -> list[dict[str, float]]:
        self.looks += 1
        return [{"CPU": self.cpus}]


def test_room_follows_the_cluster_without_asking_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes, now = Nodes(), [0.0]
    monkeypatch.setattr(cluster, "node_resources", nodes)
    room = Room(Share(cpus=1, gpus=0), None, clock=lambda: now[0])
    assert [room() for _ in range(5)] == [4] * 5
    assert nodes.looks == 1
    nodes.cpus = 6.0
    now[0] = COUNT_EVERY
    assert room() == 6


def test_room_is_at_most_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "node_resources", Nodes())
    assert Room(Share(cpus=1, gpus=0), 3)() == 3
    assert Room(Share(cpus=1, gpus=0), 9)() == 4
