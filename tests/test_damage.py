"""Run folders that are damaged or hostile: refused in a line, and nothing else comes of them."""

import contextlib
import hashlib
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.damage import damage
from support.recorded import RecordedSearch
from support.reported import empty, write_search

from tune_mnist import report as report_door
from tune_mnist import search as search_door
from tune_mnist.errors import SearchFailedError, TuneMnistError
from tune_mnist.reporting import page
from tune_mnist.runs.checkpoints import Checkpoints
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History
from tune_mnist.runs.tables import write_tables
from tune_mnist.runs.view import RunView
from tune_mnist.tuning import launch, plan
from tune_mnist.tuning.confirmation import Confirmation
from tune_mnist.tuning.experiment import Experiment, Rules
from tune_mnist.tuning.resources import TrialResources
from tune_mnist.tuning.settings import ConfirmOptions, ConfirmSettings, SearchSettings
from tune_mnist.tuning.study import Study

DRAWN = 15
SPACE = {"parameters": {"nesterov": {"choices": [True, False]}, "lr": {"low": 0.01, "high": 1}}}
Door = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results, with a run in it that has every file a run can have."""
    results = tmp_path_factory.mktemp("sound") / "results"
    search = empty(results, "run")
    write_search(search, SPACE, startup_trials=10)
    search.trial([0.9, 0.95])
    search.trial([0.97, 0.98, 0.99], lr=0.02, nesterov=True)
    search.trial([0.5], state="stopped", lr=0.1)
    search.diverged_epoch(search.start(lr=0.19))
    search.end(3, "diverged", "the loss was not finite")
    search.history.rerun_trial(search.start(lr=0.05), 30.0, ray_id="next", error="it died")
    search.epoch(4, 0.9)
    search.history.close_session("SIGTERM", search.clock)
    record = search.history.trials[4]
    Checkpoints(search.folder).save(record, record.rows[-1], b"state")
    write_tables(search.folder, search.history, "val_accuracy")
    for name in ("best.pt", "study.db", "report.html", ".lock", "tensorboard/0/events.out"):
        path = search.folder.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"something\n")
    _confirm(search.folder)
    return results


def _confirm(folder: RunFolder) -> None:
    confirmation = Confirmation.of(RunView.read(folder.path), ConfirmOptions(top=1, seeds=2))
    inner = RecordedSearch(folder.path, "confirm")
    confirmation.save(inner.folder, "run", None)
    for record in confirmation.rules.fixed_trials:
        number = inner.start(None, **record.config.as_dict())
        for _ in range(confirmation.epochs):
            inner.epoch(number, 0.98)
        inner.end(number, "complete")
    inner.history.close_session("finished", inner.clock)
    launch._conclude(folder, confirmation, inner.history, 60_000)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have searches and confirmations end where Ray would start, once all is read.

    The study is rebuilt there.
    """

    images = range(60_000)
    split = SimpleNamespace(train_labels=images, train_images=images, val_images=images)

    @contextlib.contextmanager
    def runtime(*_: Any) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(resources=TrialResources(1, 0), at_once=1, split=split)

    def session(folder: RunFolder, history: History, rules: Rules, *_: Any) -> None:
        Experiment(rules, history, Study(rules, None), Checkpoints(folder))
        history.close()
        raise SearchFailedError("here Ray would start")

    monkeypatch.setattr(launch, "_runtime", runtime)
    monkeypatch.setattr(launch, "run_session", session)
    monkeypatch.setattr(plan, "versions", dict)
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def few_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have only the first reports drawn: each takes as long as thirty refusals."""
    left = iter(range(DRAWN))

    def write_report(*arguments: Any, **options: Any) -> list[Path]:
        return drawn(*arguments, **options) if next(left, None) is not None else []

    drawn = page.write_report
    monkeypatch.setattr(page, "write_report", write_report)
    monkeypatch.setattr(page, "get_plotlyjs", lambda: "")


def _list(run: Path) -> object:
    return search_door.search(SearchSettings(list_runs=True, results_dir=run.parent))


def _report(run: Path) -> None:
    report_door.report(report_door.ReportSettings((run,), pictures=False, data_dir=run))


def _resume(run: Path) -> object:
    return launch.search(SearchSettings(resume=run, trials=30, report=False))


def _confirm_again(run: Path) -> object:
    return launch.confirm(ConfirmSettings(run, top=1, seeds=2, report=False))


def _state(path: Path) -> dict[str, object]:
    """All that lies in a folder, without following links."""
    found: dict[str, object] = {}
    for each in path.rglob("*"):
        status = each.lstat()
        content = hashlib.sha256(each.read_bytes()).digest() if each.is_file() else b""
        if each.is_symlink():
            content = bytes(each.readlink())
        found[str(each.relative_to(path))] = status.st_mode, status.st_ino, content
    return found


def _outcome(door: Door, run: Path) -> int:
    """Return a door's exit code; any error but those raised on purpose passes."""
    try:
        door(run)
    except TuneMnistError as error:
        assert len(str(error)) < 4000
        return error.exit_code
    return 0


@pytest.mark.parametrize(
    ("door", "damages", "writes"),
    [(_list, 1000, ""), (_report, 300, "|/run/report.html"), (_resume, 500, "|/run.*"),
     (_confirm_again, 300, "|/run.*")],
)  # fmt: skip
def test_a_damaged_run_ends_in_a_line_and_changes_nothing_else(
    sound: Path,
    tmp_path: Path,
    no_ray: None,
    few_drawn: None,
    door: Door,
    damages: int,
    writes: str,
) -> None:
    outside, work = tmp_path / "outside", tmp_path / "work"
    outside.mkdir()
    (outside / "file").write_text("mine")
    ends = [0, 0, 0]
    for seed in range(damages):
        shutil.copytree(sound, work)
        what = f"{seed}: {damage(work / 'run', outside, random.Random(f'{door.__name__} {seed}'))}"
        before = _state(tmp_path)
        try:
            ends[_outcome(door, work / "run")] += 1
        except Exception as error:
            raise AssertionError(what) from error
        after = _state(tmp_path)
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        assert [name for name in changed if not re.fullmatch(f"work({writes})?", name)] == [], what
        shutil.rmtree(work)
    if door is not _list:
        assert ends[2] > damages // 8  # they were damages
    if door in (_list, _report):
        assert ends[1] == 0
