import io
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console, RenderableType
from support.recorded import RecordedSearch
from support.reported import all_failed, empty, rich

from tune_mnist.cli import exit_code
from tune_mnist.mnist.metrics import Metric
from tune_mnist.reporting.summary import Listing, summary
from tune_mnist.search import search as search_command
from tune_mnist.tuning.settings import SearchSettings


@pytest.fixture
def search(tmp_path: Path) -> RecordedSearch:
    return RecordedSearch(tmp_path)


def _printed(what: RenderableType, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what, crop=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _said(search: RecordedSearch, metric: Metric = "val_accuracy", width: int = 200) -> str:
    return _printed(summary(search.folder, search.history, metric, epochs=20), width)


def _line(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line


def test_the_winner_the_baseline_the_gain_and_the_files_are_named(
    search: RecordedSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    search.trial([0.97, 0.96], [0.9712, 0.96])
    search.trial([0.98, 0.99], [0.98, 0.9853])
    said = _said(search)
    found = (
        "Best of 2 trials: trial 1, found by the search, val accuracy 99.00%, test 98.53% at ep"
    )
    assert found in said
    assert "The baseline: val accuracy 97.00%, test 97.12% at epoch 1." in said
    assert "Gain on the test set: +1.41 points." in said
    assert "the test set steered nothing" in said
    assert "One seed each: differences up to about 0.3 points may be chance." in said
    monkeypatch.chdir(search.folder.path.parent)
    search.folder.best.touch()
    assert "In search: best.csv, epochs.csv" in _said(search)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (0.97, "Best of 2 trials: trial 0, a known good point of the space's start list, val"),
        (0.99, "Over trial 0, the best known good point: +1.00 points."),
    ],
)
def test_what_was_given_is_not_called_found_and_a_baseline_may_be_missing(
    search: RecordedSearch, found: float, words: str
) -> None:
    search.trial([0.98], origin="start")
    search.trial([found])
    said = _said(search)
    assert words in said
    assert "0 (given)" in said
    assert "The baseline has not begun, so there is nothing to compare with." in said


def test_a_winner_that_chance_may_have_made_is_called_so(search: RecordedSearch) -> None:
    for val, test in ((0.98, 0.98), (0.985, 0.981), (0.984, 0.97), (0.983, 0.981)):
        search.trial([val], [test])
    assert "may be chance, so it cannot be told from the baseline." in _said(search)
    search.trial([0.9845], [0.98])
    said = _said(search)
    assert "may be chance, so it cannot be told from the baseline or trial 4." in said


def test_a_winner_picked_on_the_test_set_is_called_so(search: RecordedSearch) -> None:
    search.trial([0.97], [0.97])
    search.trial([0.96], [0.98])
    said = _said(search, "test_accuracy")
    assert "trial 1, found by the search, test accuracy 98.00% at epoch 1." in said
    assert "Picked on the test set" in said
    assert "val accuracy" not in said


def test_a_baseline_that_nothing_beats_is_the_best(search: RecordedSearch) -> None:
    search.epoch(search.start(), 0.98)
    search.trial([0.97], state="stopped")
    said = _said(search)
    assert "Of 2 trials none was better than the baseline, val accuracy 98.00%" in said
    assert "Gain" not in said
    search.trial([0.99])
    assert "The baseline so far: val accuracy 98.00%" in _said(search)


def test_the_table_holds_five_and_the_baseline_and_only_what_differs(
    search: RecordedSearch,
) -> None:
    search.trial([0.90])
    for number in range(1, 8):
        search.trial([0.90 + number / 100], lr=0.01 * number, momentum=0.9)
    said = _said(search)
    assert _line(said, "rank").split()[-2:] == ["epoch", "lr"]
    ranks = [line.split()[:2] for line in said.splitlines() if line[:1].isdigit()]
    assert ranks == [["1", "7"], ["2", "6"], ["3", "5"], ["4", "4"], ["5", "3"], ["8", "0"]]
    assert "0 (baseline)" in said


def test_a_table_that_is_too_wide_is_turned(search: RecordedSearch) -> None:
    search.trial([0.90])
    search.trial([0.91], lr=0.02, dropout=0.2, rotation=10.0, shift=0.05, label_smoothing=0.1)
    wide, narrow = _said(search, width=200), _said(search, width=80)
    assert _line(wide, "rank").split()[-1] == "shift"
    assert _line(narrow, "rank").split() == ["rank", "1", "2"]
    assert _line(narrow, "shift").split() == ["shift", "0.05", "0"]
    assert max(map(len, narrow.splitlines())) <= 80


def test_the_cost_is_compared_with_training_all_to_the_end(search: RecordedSearch) -> None:
    search.trial([0.9] * 20)
    search.trial([0.9] * 2, state="stopped")
    search.trial([0.9], state="stopped")
    search.epoch(search.start(), 0.9)
    said = _said(search)
    assert "2 stopped, 0 diverged, 0 failed, 1 interrupted, to be resumed" in said
    assert "Epochs: 24 of the 80 that training all of them to the end takes (30%)." in said


def test_the_first_failure_and_the_first_divergence_are_explained(search: RecordedSearch) -> None:
    assert "No trial was started." in _said(search)
    assert "Epochs" not in _said(search)
    for reason in ("RuntimeError: [red]first[/red]", "RuntimeError: second"):
        search.end(search.start(), "failed", reason)
    said = _said(search)
    assert "None of 2 trials finished an epoch that counts." in said
    assert "2 failed; the first, trial 0: RuntimeError: [red]first[/red]" in said
    diverged = search.start()
    search.diverged_epoch(diverged)
    search.end(diverged, "diverged", "the loss was not finite at step 33 of epoch 1")
    search.trial([0.98])
    said = _said(search)
    assert "The baseline has no epoch to compare with." in said
    assert "1 diverged; trial 2: the loss was not finite at step 33 of epoch 1" in said
    assert all(char.isprintable() for char in said.replace("\n", ""))  # no terminal: plain text


def test_every_run_is_listed_with_its_state_its_best_and_its_trials(tmp_path: Path) -> None:
    rich(tmp_path, "[bold]done", end="finished")
    rich(tmp_path, "out", end="out of time")
    rich(tmp_path, "interrupted", end="SIGINT")
    rich(tmp_path, "killed", end="")
    all_failed(tmp_path, "broken")
    running = empty(tmp_path, "running")
    with FileLock(running.folder.path / ".lock"):
        printed = _printed(Listing(tmp_path))
    found = {line.split("  ")[0]: " ".join(line.split()[1:]) for line in printed.splitlines()[1:]}
    assert found["[bold]done"].startswith("finished 23/20")
    assert " 98.85% 98.85% " in found["[bold]done"]
    assert found["out"].startswith("out of time 23")
    assert found["interrupted"].startswith("interrupted 23")
    assert found["killed"].startswith("killed 23")
    assert found["broken"].startswith("failed 3/20 - - ")
    assert found["running"].startswith("running 0/20 - - 0 s ")


def test_a_damaged_run_hides_no_other(tmp_path: Path) -> None:
    rich(tmp_path, "good")
    damaged = rich(tmp_path, "damaged")
    damaged.folder.events.write_text("{}\n")
    lines = _printed(Listing(tmp_path)).splitlines()
    assert lines[1].startswith("good")
    assert lines[2].startswith(f"damaged: {damaged.folder.events} is damaged in line 1 (")


@pytest.mark.parametrize("width", [80, 40, 200])
def test_no_width_breaks_a_name(tmp_path: Path, width: int) -> None:
    names = ["a-rather-long-name-20261123-101500", "x" * 120]
    for name in names:
        rich(tmp_path, name, trials=5)
    lines = _printed(Listing(tmp_path), width).splitlines()
    for name in names:
        (line,) = [line for line in lines if line.startswith(name)]
        assert width == 200 or line == name


def test_the_search_command_lists_and_starts_nothing(tmp_path: Path) -> None:
    arguments = ["--list", "--results-dir", str(tmp_path / "none")]
    assert exit_code("search", SearchSettings, search_command, arguments) == 0
    assert not (tmp_path / "none").exists()
