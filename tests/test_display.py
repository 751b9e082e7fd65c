import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, Group
from support.recorded import RecordedSearch

from tune_mnist.mnist.data import Split
from tune_mnist.runs.space import load_space
from tune_mnist.tuning.experiment import Rules
from tune_mnist.tuning.live_view import announce, finished_line, live_view, nodes_line, start_line
from tune_mnist.tuning.resources import Node, TrialResources
from tune_mnist.tuning.tally import Tally

RULES = Rules(
    space=load_space("sgd"),
    metric="val_accuracy",
    trials=50,
    epochs=20,
    time_budget=math.inf,
    grace_epochs=1,
    reduction_factor=3.0,
    startup_trials=10,
    seed=0,
)


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordedSearch:
    monkeypatch.chdir(tmp_path)
    return RecordedSearch(tmp_path)


def _split(train: int, val: int) -> Split:
    def images(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return np.zeros((count, 1, 1), np.uint8)

    def labels(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return np.zeros(count, np.uint8)

    return Split(images(train), labels(train), images(val), labels(val), images(1), labels(1))


def _view(search: RecordedSearch, rules: Rules = RULES, height: int = 30) -> list[str]:
    tally = Tally(rules, search.history, 0.0)
    for record in search.history.unfinished():
        tally.start(record.number)
    return live_view(tally, search.folder, 200.0, height).plain.splitlines()


def _node(last: int, cpus: float, gpus: float = 0.0) -> Node:
    return Node("id", cpus, gpus, 64_000.0, f"10.0.0.{last}")


def test_the_nodes_line_says_how_many_trials_run_where() -> None:
    nodes = [_node(1, 4, 1), _node(2, 1, 1), _node(3, 8)]
    assert nodes_line(nodes, TrialResources(1, 0.25)) == (
        "3 nodes: 10.0.0.1 4 trials, 10.0.0.2 1 trial, 10.0.0.3 no trial (8 CPUs, no GPU)"
    )


def test_alike_nodes_of_a_large_cluster_are_counted() -> None:
    nodes = [*(_node(n, 16) for n in range(1, 41)), _node(41, 0)]
    assert nodes_line(nodes, TrialResources(1, 0)) == (
        "41 nodes: 40 of 16 CPUs 16 trials each, 1 of 0 CPUs no trial"
    )


def test_a_log_has_whole_lines_and_a_terminal_lines_that_fit() -> None:
    start, nodes = "run: " + "many words " * 12, [_node(1, 4), _node(2, 8)]
    for is_terminal, longest in ((False, len(start)), (True, 40)):
        file = io.StringIO()
        console = Console(file=file, force_terminal=is_terminal, width=40)
        announce(console, start, nodes, TrialResources(1, 0))
        shown = file.getvalue()
        assert max(map(len, shown.splitlines())) == pytest.approx(longest, abs=8)
        assert "2 nodes: 10.0.0.1 4 trials" in shown
    announce(console, start, nodes[:1], TrialResources(1, 0))
    assert file.getvalue().count("2 nodes") == 1


def test_the_start_line_says_what_will_run(search: RecordedSearch) -> None:
    line = start_line(
        search.folder, RULES, search.history, TrialResources(1, 0), 2, _split(55_000, 5_000)
    )
    assert line == (
        "search: up to 50 trials of at most 20 epochs, 2 at a time on 2 CPUs, "
        "55,000 training images, held-out 5,000 steer"
    )


def test_the_start_line_names_budget_gpus_and_a_test_set_that_steers(
    search: RecordedSearch,
) -> None:
    rules = replace(RULES, time_budget=600.0, trials=1)
    line = start_line(
        search.folder, rules, search.history, TrialResources(1, 0.25), 4, _split(60_000, 0)
    )
    assert line == (
        "search: up to 1 trial of at most 20 epochs, for at most 10 min, 4 at a time on "
        "4 CPUs and 1 GPU, 60,000 training images, the test set steers"
    )


def test_the_start_line_of_a_resumed_search_says_what_is_done(search: RecordedSearch) -> None:
    search.trial([0.9])
    search.start()
    line = start_line(
        search.folder, RULES, search.history, TrialResources(1, 0), 1, _split(500, 50)
    )
    assert line.startswith("going on with search: 1 of 50 trials done in 5 s, at most 20 epochs")
    assert "1 at a time on 1 CPU, 500 training images" in line


def test_the_view_shows_counts_best_baseline_and_the_running(search: RecordedSearch) -> None:
    search.trial([0.96, 0.95], [0.97, 0.96])
    search.trial([0.98], [0.975], state="stopped", lr=0.05)
    search.trial([0.5], state="failed", reason="RuntimeError: no such device")
    running = search.start(lr=0.031234, dropout=0.0)
    search.epoch(running, 0.955)
    search.start()
    assert _view(search) == [
        "search",
        "trials    3 of 50 done (1 complete, 1 stopped, 1 failed), 2 running",
        "epochs    5",
        "time      3 min 20 s",
        "best      val 98.00%, test 97.50%  trial 1 at epoch 1",
        "baseline  val 96.00%, test 97.00%  trial 0 at epoch 1",
        "failed    trial 2: RuntimeError: no such device",
        "",
        "trial    epoch      val  s/epoch  differs from the baseline in",
        "    3     1/20   95.50%      2.5  lr 0.0312, dropout 0",
        "    4     0/20        -        -  as the baseline",
    ]


def test_before_the_first_epoch_the_view_shows_what_there_is(search: RecordedSearch) -> None:
    assert _view(search) == [
        "search",
        "trials    0 of 50 done, 0 running",
        "epochs    0",
        "time      3 min 20 s",
    ]


def test_where_the_test_set_steers_only_its_accuracy_is_shown(search: RecordedSearch) -> None:
    search.epoch(search.start(), math.nan, 0.97)
    view = _view(search, replace(RULES, metric="test_accuracy"))
    assert "best      test 97.00%  trial 0 at epoch 1" in view
    assert view[-1].split()[:4] == ["0", "1/20", "97.00%", "2.5"]


def test_a_diverged_epoch_of_a_running_trial_is_a_dash(search: RecordedSearch) -> None:
    search.diverged_epoch(search.start())
    assert _view(search)[-1].split()[:4] == ["0", "1/20", "-", "2"]


@pytest.mark.parametrize("height", [5, 8, 9, 10, 12, 30])
def test_the_view_is_no_higher_than_the_terminal(search: RecordedSearch, height: int) -> None:
    for _ in range(20):
        search.start()
    view = _view(search, height=height)
    assert len(view) <= max(height, 4)
    hidden = 20 - sum(line.endswith("as the baseline") for line in view)
    if height >= 9 and hidden:
        assert view[-1].strip() == f"and {hidden} more"


def test_a_line_is_cut_where_the_terminal_is_narrow(search: RecordedSearch) -> None:
    search.start(lr=0.012345, momentum=0.812345, dropout=0.212345, weight_decay=0.000123)
    tally = Tally(RULES, search.history, 0.0)
    tally.start(0)
    console = Console(file=io.StringIO(), width=50)
    console.print(Group(live_view(tally, search.folder, 200.0, 30)))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == len(live_view(tally, search.folder, 200.0, 30).plain.splitlines())
    assert max(map(len, lines)) <= 50


def test_a_finished_trial_is_one_line(search: RecordedSearch) -> None:
    search.trial([0.98, 0.97], [0.981, 0.97], state="stopped", lr=0.02, nesterov=True)
    tally = Tally(RULES, search.history, 0.0)
    assert finished_line(tally, search.history.trials[0], 200.0) == (
        "[3 min 20 s] 1/50 done: trial 0 stopped after 2 epochs, "
        "val 98.00%, test 98.10% at epoch 1, lr 0.02, nesterov"
    )


def test_a_failed_trial_is_one_line_with_its_reason(search: RecordedSearch) -> None:
    search.end(search.start(), "failed", "RuntimeError: no such device")
    tally = Tally(RULES, search.history, 0.0)
    assert finished_line(tally, search.history.trials[0], 9.0) == (
        "[9 s] 1/50 done: trial 0 failed (RuntimeError: no such device) after 0 epochs, "
        "no epoch to judge it by, as the baseline"
    )
