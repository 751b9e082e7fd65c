import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ray.cluster_utils import Cluster
from support.drivers import act_at
from support.reported import all_failed, empty, rich
from support.scripted import Script
from support.scripted_search import send_scripts_to_workers

from tune_mnist.errors import ConfigError, RunFolderError
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.reporting.page import write_report
from tune_mnist.runs.confirmed import AskedConfirmation, Candidate, read_asked
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History
from tune_mnist.runs.view import RunView
from tune_mnist.tuning.confirmation import Confirmation
from tune_mnist.tuning.launch import confirm
from tune_mnist.tuning.plan import Plan
from tune_mnist.tuning.settings import ConfirmOptions, ConfirmSettings

pytest_plugins = ["support.ray_fixtures"]

SCRIPT = Script(seconds=0.0)


@pytest.fixture
def settings(cluster: Cluster, tmp_path: Path) -> Iterator[ConfirmSettings]:
    """What confirms two winners of a recorded search on three seeds."""
    send_scripts_to_workers()
    before = signal.getsignal(signal.SIGTERM)
    run = rich(tmp_path).folder.path
    yield ConfirmSettings(
        run=run, top=2, seeds=3, images=1000, address=cluster.address, report=False
    )
    signal.signal(signal.SIGTERM, before)


def _history(settings: ConfirmSettings) -> History:
    assert settings.run is not None
    return History.load(RunFolder.open(settings.run / "confirm"))


def test_winners_and_baseline_are_trained_again_on_the_same_fresh_seeds(
    settings: ConfirmSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert confirm(settings, SCRIPT) == 0
    assert settings.run is not None
    run = RunView.read(settings.run)
    records = list(_history(settings).trials.values())
    assert [record.state for record in records] == ["complete"] * 9
    assert {record.epochs for record in records} == {9}
    assert [record.origin for record in records] == ["baseline", "start", "start"] * 3
    winners = [each.record.config for each in run.ranked if not each.is_baseline][:2]
    for position, config in enumerate([run.trials[0].record.config, *winners]):
        assert all(record.config == config for record in records[position::3])
    seeds = [record.seed for record in records]
    assert len({*seeds[::3]}) == 3
    assert seeds[::3] == seeds[1::3] == seeds[2::3]
    assert not {*seeds} & {record.seed for record in run.history.trials.values()}

    table = pd.read_csv(settings.run / "confirmed.csv")
    names = ["baseline", *(f"trial {e.record.number}" for e in run.ranked[:2])]
    assert list(table["configuration"]) == names
    assert list(table["n"]) == [3, 3, 3]
    for row, record in zip(table.itertuples(), records, strict=False):
        assert row.test_accuracy_mean == pytest.approx(record.rows[-1].test_accuracy, abs=1e-6)
    said = " ".join(capsys.readouterr().out.split())
    assert f"Over 3 fresh seeds on 1,000 training images {names[1]} reaches" in said
    page = settings.run / "report.html"
    write_report([RunView.read(settings.run)], page, pictures=False)
    assert f"Over 3 fresh seeds on 1,000 training images {names[1]} reaches" in page.read_text()
    assert "Confirmed on fresh seeds" in page.read_text()


@pytest.mark.slow
def test_an_interrupted_one_is_resumed_and_more_seeds_add_to_it(
    settings: ConfirmSettings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(History, "add_epoch", History.add_epoch)  # puts it back in the end
        act_at(History, "add_epoch", 20, partial(signal.raise_signal, signal.SIGINT))
        assert confirm(settings, SCRIPT) == 130
    assert "resume it with the same command" in capsys.readouterr().out
    first = _history(settings)
    assert first.closed_as == "SIGINT"
    assert 20 <= len(first.rows) < 3 * 3 * 9
    assert confirm(settings, SCRIPT) == 0
    assert " of them done in " in " ".join(capsys.readouterr().out.split())
    second = _history(settings)
    assert [row.epoch for _, row in second.rows[: len(first.rows)]] == [
        row.epoch for _, row in first.rows
    ]
    assert confirm(replace(settings, seeds=4), SCRIPT) == 0
    third = _history(settings)
    assert [r.state for r in third.trials.values()] == ["complete"] * 12
    assert [r.seed for r in third.trials.values()][:9] == [r.seed for r in second.trials.values()]
    sessions = third.sessions
    assert confirm(replace(settings, seeds=4), SCRIPT) == 0  # and nothing is left to do
    assert _history(settings).sessions == sessions
    table = RunFolder(settings.run or Path()).confirmed
    assert confirm(replace(settings, seeds=2), SCRIPT) == 0  # what is there counts
    assert list(pd.read_csv(table)["n"]) == [4] * 3
    with pytest.raises(RunFolderError, match="with other epochs"):
        confirm(replace(settings, seeds=4, epochs=3), SCRIPT)
    with pytest.raises(RunFolderError, match="with other configurations"):
        confirm(replace(settings, seeds=4, top=1), SCRIPT)


def _asked(run: RunView, **options: Any) -> Confirmation:
    return Confirmation.of(run, ConfirmOptions(**{"top": 2, "seeds": 3, **options}))


def _before(confirmation: Confirmation, path: Path) -> AskedConfirmation:
    """Return a confirmation as a later session reads it."""
    inner = RunFolder(path / "confirm")
    inner.path.mkdir(exist_ok=True)
    confirmation.save(inner, "run", None)
    return read_asked(inner)


@pytest.mark.parametrize(
    ("options", "differences"),
    [
        ({}, []),
        ({"seeds": 5}, []),
        ({"seeds": 1}, []),
        ({"epochs": 3, "images": 600}, ["epochs", "images"]),
        ({"top": 1}, ["configurations"]),
    ],
)
def test_a_confirmation_is_resumed_by_what_asks_for_the_same(
    tmp_path: Path, options: dict[str, Any], differences: list[str]
) -> None:
    run = RunView.read(rich(tmp_path).folder.path)
    before = _before(_asked(run), tmp_path)
    assert _asked(run, **options).differences(before) == differences


def test_a_search_that_goes_on_changes_ranks_or_winners(tmp_path: Path) -> None:
    search = rich(tmp_path)
    run = RunView.read(search.folder.path)
    before = _before(_asked(run), tmp_path)
    first, second = (each.record for each in run.ranked[:2])
    top = max(row.val_accuracy for row in first.rows)
    search.trial([0.5])  # ranks below these all, the baseline too
    asked = _asked(RunView.read(run.folder.path)).continuing(before)
    assert asked.differences(before) == []
    # The second takes the lead: its trainings keep their numbers, and lead the table.
    order = tuple(before.configurations[i] for i in (0, 2, 1))
    swapped = replace(before, configurations=order)
    asked = asked.continuing(swapped)
    assert [each.trial for each in asked.candidates] == [0, second.number, first.number]
    assert asked.differences(swapped) == []
    search.trial([top + 0.001])
    asked = _asked(RunView.read(run.folder.path)).continuing(before)
    assert asked.differences(before) == ["winners"]
    assert asked.differences(None) == ["settings"]


def test_a_baseline_that_the_search_has_not_begun_is_confirmed_with_the_rest(
    tmp_path: Path,
) -> None:
    search = empty(tmp_path, "run")
    search.trial([0.98], origin="start", lr=0.05)
    asked = _asked(RunView.read(search.folder.path))
    assert asked.candidates[0] == Candidate("baseline", 1, 0, TrainConfig())
    assert asked.rules.fixed_trials[0].origin == "baseline"
    line = asked.start_line(search.folder, History(search.folder), images=1000, at_once=2)
    assert "the baseline, which the search has not begun, and 1 winner on" in line
    (page, *_) = write_report([RunView.read(search.folder.path)], pictures=False)
    assert "The baseline has not begun" in page.read_text()


def test_what_cannot_be_confirmed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to confirm"):
        confirm(ConfirmSettings(run=all_failed(tmp_path).folder.path))
    with pytest.raises(ConfigError, match="name the search's folder"):
        confirm(ConfirmSettings())
    with pytest.raises(RunFolderError, match="is no run's folder"):
        confirm(ConfirmSettings(run=tmp_path / "none"))


def test_a_confirmation_is_not_taken_for_a_search(tmp_path: Path) -> None:
    folder = rich(tmp_path).folder
    inner = RunFolder.create(folder.path / "confirm")
    inner.write_search({"confirmation": {}})
    for read in (lambda: RunView.read(inner.path), lambda: Plan.load(inner)):
        with pytest.raises(RunFolderError, match=r"python -m tune_mnist\.confirm .*/rich resumes"):
            read()
