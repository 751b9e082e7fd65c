"""How the cluster benchmark counts; never a speed."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from tune_mnist.benchmarks import cluster as cluster_module
from tune_mnist.benchmarks.cluster import Mark, cluster, measure, steady
from tune_mnist.benchmarks.settings import ClusterSettings
from tune_mnist.cli import tell
from tune_mnist.errors import TuneMnistError
from tune_mnist.tuning.settings import SearchSettings


def test_reports_count_from_when_all_trials_are_there_until_the_first_is_at_its_last_epoch() -> (
    None
):
    epochs = (1, 1, 1, 2, 2, 3, 2, 3, 3)  # of three trials, in the order they were told
    marks = [Mark(epoch, float(at), at / 2) for at, epoch in enumerate(epochs)]
    assert steady(marks, at_once=3, epochs=3) == (3.0, 1.5, 3)


@pytest.mark.slow
def test_a_search_on_three_nodes_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cluster(ClusterSettings(at_once=(6,), quick=True, save=tmp_path / "cluster.csv"))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rate, wall = found["reports_per_second"]["6"], found["ms_per_report"]["6"]
    assert rate == pytest.approx(1e3 / wall, rel=1e-2)
    assert found["driver_ms_per_report"]["6"] > 0
    assert found["nodes"] == 3
    assert (tmp_path / "cluster.csv").read_text().count("\n") == 4


def test_a_search_that_fails_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(settings: SearchSettings) -> int:
        tell("no luck")
        return 1

    monkeypatch.setattr(cluster_module, "search", fail)
    monkeypatch.setattr(
        cluster_module, "three_nodes", lambda _: nullcontext(("nowhere", tmp_path))
    )
    with pytest.raises(TuneMnistError, match="ended with 1: no luck"):
        measure(3, 4)
