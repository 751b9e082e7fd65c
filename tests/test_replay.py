"""Searches replayed on learning curves whose best is known."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from support.course import Course

from tune_mnist.benchmarks import curves as module
from tune_mnist.benchmarks.curves import curves, record
from tune_mnist.benchmarks.replay import (
    RecordedCurves,
    epochs_of,
    picks,
    rank_correlations,
    read_curves,
    replay,
)
from tune_mnist.benchmarks.replay_systems import Ours, Random, line_up
from tune_mnist.benchmarks.settings import CURVES, CurvesSettings, ReplaySettings
from tune_mnist.errors import ConfigError
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Mnist
from tune_mnist.runs.space import SearchSpace, load_space

KEPT = Path(__file__).parents[1] / CURVES
EPOCHS = 9
DIVERGING = 5  # the configuration that does, after its second epoch
Rising = Callable[[float, int], float]  # how good a configuration is, epoch -> accuracy


def steady(quality: float, epoch: int) -> float:
    """Keep the order from the first epoch on."""
    return 0.9 + 0.1 * quality * epoch / EPOCHS


def late(quality: float, epoch: int) -> float:
    """Begin in the opposite order."""
    return 0.95 + 0.05 * quality * (epoch - EPOCHS / 2) / EPOCHS


def space() -> SearchSpace:
    return replace(load_space("default"), start=(), epochs=EPOCHS)


def table(rising: Rising = steady, configs: int = 24) -> pd.DataFrame:
    """Make up what `bench curves` would have recorded: the higher the rate the better."""
    proposed = Random(space(), EPOCHS, seed=1)
    rows = []
    for number in range(configs):
        config = proposed.propose(number)
        quality = (np.log10(config.lr) + 3) / 2.2
        for epoch in range(1, EPOCHS + 1):
            diverged = number == DIVERGING and epoch > 2
            accuracy = np.nan if diverged else rising(quality, epoch)
            last = accuracy if epoch == EPOCHS else np.nan
            scores = {"val_accuracy": accuracy, "val_loss": 1 - accuracy, "test_accuracy": last}
            averaged = {f"averaged_{name}": value for name, value in scores.items()}
            values = {f"config_{name}": value for name, value in config.as_dict().items()}
            rows.append({"config": number, "epoch": epoch, **scores, **averaged, **values})
            if diverged:
                break
    return pd.DataFrame(rows)


def recorded(rising: Rising = steady) -> RecordedCurves:
    return RecordedCurves.of(table(rising), space(), "averaged")


def test_a_recorded_configuration_stands_in_for_itself_and_for_its_kind() -> None:
    known = recorded()
    assert np.isnan(known.val_accuracy[DIVERGING, 2:]).all()
    assert known.test_accuracy[DIVERGING] == 0.1  # no better than a guess
    assert [known.nearest(config) for config in known.configs] == list(range(len(known.configs)))
    kinds = {(config.optimizer, config.schedule) for config in known.configs}
    for asked in map(Random(space(), EPOCHS, seed=2).propose, range(50)):
        found = known.configs[known.nearest(asked)]
        if (asked.optimizer, asked.schedule) in kinds:
            assert (found.optimizer, found.schedule) == (asked.optimizer, asked.schedule)


def test_the_pick_is_the_highest_so_far_and_of_equals_the_lower_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = recorded()
    accuracy = np.zeros_like(known.val_accuracy)
    loss = np.ones_like(accuracy)
    loss[3] = 0.5
    known = replace(known, val_accuracy=accuracy, val_loss=loss)
    in_order = Random(space(), EPOCHS, 0)
    monkeypatch.setattr(in_order, "propose", known.configs.__getitem__)
    found = picks(in_order, known, budgets=(1, 3 * EPOCHS, 3 * EPOCHS + 1), at_once=1)
    assert found == [0, 0, 3]


def test_trials_take_turns_and_an_ended_one_makes_room() -> None:
    spent = [epoch for _, epoch in islice(epochs_of(Random(space(), 2, 0), recorded(), 2), 6)]
    assert spent == [1, 1, 2, 2, 1, 1]


@pytest.mark.parametrize(("rising", "early"), [(steady, "1.00"), (late, "-1.00")])
def test_picking_after_one_epoch_goes_wrong_where_the_order_turns(
    rising: Rising, early: str
) -> None:
    known = recorded(rising)
    (pick,) = picks(Random(space(), 1, 0), known, budgets=(200,), at_once=4)
    regret = known.test_accuracy.max() - known.test_accuracy[pick]
    assert regret > 0.02 if rising is late else regret < 0.002
    first = rank_correlations(table(rising).query(f"config != {DIVERGING}")).splitlines()[1]
    assert first.split() == ["all", "raw", early, early, "1.00", "23"]


@pytest.mark.parametrize("compared", ["systems", "stopping", "sampling"])
def test_every_search_of_a_line_up_ends_near_the_best_and_repeats_itself(compared: str) -> None:
    known = recorded()
    for name, entry in line_up(compared).items():  # type: ignore[arg-type]
        first, last = picks(entry.build(space(), EPOCHS, 3), known, budgets=(30, 120), at_once=3)
        again = picks(entry.build(space(), EPOCHS, 3), known, budgets=(30,), at_once=3)
        assert again == [first], name
        assert known.test_accuracy.max() - known.test_accuracy[last] < 0.03, name


def test_ours_does_on_curves_what_the_real_search_does(tmp_path: Path) -> None:
    known = recorded()
    search = Ours(space(), EPOCHS, 0, grace_epochs=1, reduction_factor=3, startup_trials=6)
    wanted = list(islice(epochs_of(search, known, 3), 120))
    assert wanted == list(islice(epochs_of(Real(tmp_path), known, 3), 120))


class Real:
    """The object that runs a real search, with the same settings."""

    def __init__(self, path: Path) -> None:
        file = path / "default.yaml"
        file.write_text(yaml.safe_dump(space().as_dict(), sort_keys=False))
        rules = {"epochs": EPOCHS, "trials": 1000, "reduction_factor": 3, "startup_trials": 6}
        self._course = Course(path / "run", space=str(file), **rules)  # type: ignore[arg-type]

    def propose(self, number: int) -> TrainConfig:
        return self._course.experiment.next_trial(str(number)).config

    def report(self, number: int, epoch: int, value: float) -> bool:
        return self._course.epoch(number, value, val_loss=0.5)

    def end(self, number: int, value: float, *, complete: bool) -> None:
        self._course.experiment.finish(number)


def test_a_replay_compares_with_ours_pair_by_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, save = tmp_path / "curves.csv", tmp_path / "all.csv"
    table(late).to_csv(file, index=False)
    file.with_suffix(".yaml").write_text(yaml.safe_dump(space().as_dict(), sort_keys=False))
    asked = {"compare": "sampling", "repetitions": 2, "budgets": (20, 30), "save": save}
    replay(ReplaySettings(curves=file, **asked))  # type: ignore[arg-type]
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert (found["n"], found["epochs"]) == (2, 30)
    assert found["behind_ours"]["ours"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    saved = pd.read_csv(save)
    ours = saved[(saved["subject"] == "ours") & (saved["quantity"] == "regret_at_30")]["value"]
    assert len(ours) == 2
    assert found["regret"]["ours"] == pytest.approx(ours.mean(), rel=1e-3)
    assert "rank correlation with the end" in out
    assert "regret, percentage points" in out


def test_a_file_that_holds_no_curves_is_refused_and_one_with_curves_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "curves.csv"
    with pytest.raises(ConfigError, match="bench curves makes it"):
        read_curves(file)
    file.write_text("config,epoch\n0,1\n")
    with pytest.raises(ConfigError, match="has no column"):
        read_curves(file)
    table(configs=3).to_csv(file, index=False)
    before = file.read_bytes()
    curves(CurvesSettings(save=file, configs=3, space="sgd"))
    assert (file.read_bytes(), capsys.readouterr().out) == (before, "")
    assert "momentum" in file.with_suffix(".yaml").read_text()


def test_the_curves_kept_here_lie_in_the_space_beside_them() -> None:
    drawn_from = load_space(ReplaySettings(curves=KEPT).drawn_from)
    known = RecordedCurves.of(read_curves(KEPT), drawn_from, "averaged")
    assert [config for config in known.configs if not drawn_from.frozen_params(config)] == []


def test_a_recorded_curve_scores_raw_and_averaged_weights_and_tests_at_the_end(
    small_mnist: Mnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_mnist", lambda _: small_mnist)
    config = TrainConfig(lr=0.05, dropout=0.0)
    first, last = record(0, config, epochs=2, images=640, data_dir=None)
    for name in ("test_accuracy", "averaged_test_accuracy"):
        assert np.isnan(first[name])
        assert 0.1 < last[name] <= 1
    assert last["val_loss"] != last["averaged_val_loss"]
    assert "config_ema_decay" not in last
