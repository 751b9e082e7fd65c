from typing import Any, cast

import pytest

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.data import Mnist, Split, split
from tune_mnist.tuning import packing as module
from tune_mnist.tuning.packing import Packing, Probe, best_of, packings, part_of, probe_all
from tune_mnist.tuning.resources import Node, TrialResources
from tune_mnist.tuning.settings import SearchSettings

ONE_CPU = TrialResources(cpus=1, gpus=0)


def node(cpus: int, gpus: int = 0, megabytes: float = 64_000) -> Node:
    return Node("node", cpus, gpus, megabytes)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (node(1), [(1, 1, 0)]),
        (node(6), [(1, 6, 0), (2, 3, 0), (4, 1, 0), (6, 1, 0)]),
        (node(4, gpus=1), [(1, 1, 1), (2, 1, 0.5), (4, 1, 0.25), (8, 0.5, 0.125)]),
        (node(16, gpus=8), [(1, 1, 1), (2, 1, 0.5), (4, 0.5, 0.25)]),
        (node(5, gpus=2), [(1, 1, 1), (2, 1, 0.5), (4, 0.625, 0.25)]),
    ],
)
def test_trials_at_once_double_until_the_machine_is_full(
    machine: Node, expected: list[tuple[int, float, float]]
) -> None:
    found = packings(machine)
    shares = [(each.at_once, each.resources.cpus, each.resources.gpus) for each in found]
    assert shares == expected
    assert all(each.resources.slots_on(machine) >= each.at_once for each in found)


@pytest.mark.parametrize("tightest", [120, 152])
def test_the_most_epochs_an_hour_win_and_near_equals_go_to_fewer_trials(tightest: float) -> None:
    rates = {1: 100, 2: 150, 4: tightest}
    probes = [Probe(Packing(each, ONE_CPU), rate, 500) for each, rate in rates.items()]
    assert best_of(probes).packing.at_once == 2


@pytest.mark.parametrize(
    ("machine", "rates", "tried"),
    [
        (node(8), [100, 90, 200, 300], [1, 2]),
        (node(8), [100, 190, 350, 600], [1, 2, 4, 8]),
        (node(8, megabytes=2_100), [100, 190, 350, 600], [1, 2]),
        (node(4, gpus=1, megabytes=2_100), [100, 190, 350, 600], [1, 2, 4, 8]),
    ],
)
def test_tighter_packings_are_not_tried_once_it_gets_worse_or_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, machine: Node, rates: list[float], tried: list[int]
) -> None:
    left, no_split = iter(rates), cast(Split, None)
    monkeypatch.setattr(module, "probe_packing", lambda _, each, *__: Probe(each, next(left), 500))
    assert [probe.packing.at_once for probe in probe_all(machine, no_split)] == tried


def test_a_part_of_a_split_keeps_something_of_each_set(small_mnist: Mnist) -> None:
    part = part_of(split(small_mnist, holdout=True), 1000)
    assert (len(part.train_images), len(part.train_labels)) == (256, 256)
    assert len(part.val_labels) == len(part.test_images) == 1
    everything = split(small_mnist, holdout=False)
    assert len(part_of(everything, 1).train_labels) == 1200
    assert len(part_of(everything, 7).val_labels) == 0


def test_a_packing_says_what_to_ask_the_search_for() -> None:
    assert Packing(2, ONE_CPU).options() == "--cpus-per-trial 1"
    quarter = Packing(4, TrialResources(cpus=0.5, gpus=0.25))
    assert quarter.options() == "--cpus-per-trial 0.5 --gpus-per-trial 0.25"
    assert str(quarter) == "4 trials on 0.5 CPU and 0.25 GPU each"
    assert str(Packing(1, TrialResources(cpus=2, gpus=0))) == "1 trial on 2 CPUs"


@pytest.mark.parametrize("shares", [{"cpus_per_trial": 2}, {"gpus_per_trial": 0.5}])
def test_pack_auto_and_shares_of_ones_own_exclude_each_other(shares: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--pack"):
        SearchSettings(pack="auto", **shares)
