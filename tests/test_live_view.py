"""What a person sees while a search runs: the lines, the view, and when they are drawn."""

import io
import math
import re
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console, ConsoleDimensions, Group
from support.course import Course, new_rules
from support.recorded import RecordedSearch, tally_of
from support.terminal import Terminal

from tune_mnist.tuning import live_view as module
from tune_mnist.tuning.live_view import (
    Progress,
    announce,
    finished_line,
    live_view,
    nodes_line,
    start_line,
)
from tune_mnist.tuning.resources import Node, TrialResources

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
ONE_CPU, QUARTER_GPU = TrialResources(1, 0), TrialResources(1, 0.25)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordedSearch:
    monkeypatch.chdir(tmp_path)
    return RecordedSearch(tmp_path)


def _view(search: RecordedSearch, height: int = 30, **rules: Any) -> list[str]:
    tally = tally_of(search, **rules)
    return live_view(tally, search.folder, 200.0, height).plain.splitlines()


def _start_line(
    search: RecordedSearch, resources: TrialResources, at_once: int, *images: int, **rules: Any
) -> str:
    train, val = map(range, images)
    data: Any = SimpleNamespace(train_images=train, val_images=val)
    asked = new_rules(**{"trials": 50, "epochs": 20, **rules})
    return start_line(search.folder, asked, search.history, resources, at_once, data)


def _node(last: int, cpus: float, gpus: float = 0.0) -> Node:
    return Node("id", cpus, gpus, 64_000.0, f"10.0.0.{last}")


def test_the_nodes_line_names_few_nodes_and_counts_many_by_kind() -> None:
    assert nodes_line([_node(1, 4, 1), _node(2, 1, 1), _node(3, 8)], QUARTER_GPU) == (
        "3 nodes: 10.0.0.1 4 trials, 10.0.0.2 1 trial, 10.0.0.3 no trial (8 CPUs, no GPU)"
    )
    many = [*(_node(n, 16) for n in range(1, 41)), _node(41, 0)]
    expected = "41 nodes: 40 of 16 CPUs 16 trials each, 1 of 0 CPUs no trial"
    assert nodes_line(many, ONE_CPU) == expected


def test_a_log_has_whole_lines_and_a_terminal_lines_that_fit() -> None:
    start, nodes = "run: " + "many words " * 12, [_node(1, 4), _node(2, 8)]
    for is_terminal, longest in ((False, len(start)), (True, 40)):
        file = io.StringIO()
        console = Console(file=file, force_terminal=is_terminal, width=40)
        announce(console, start, nodes, ONE_CPU)
        shown = file.getvalue()
        assert max(map(len, shown.splitlines())) == pytest.approx(longest, abs=8)
        assert "2 nodes: 10.0.0.1 4 trials" in shown
    announce(console, start, nodes[:1], ONE_CPU)
    assert file.getvalue().count("2 nodes") == 1


def test_the_start_line_says_what_will_run_and_what_is_done(recorded: RecordedSearch) -> None:
    assert _start_line(recorded, ONE_CPU, 2, 55_000, 5_000) == (
        "search: up to 50 trials of at most 20 epochs, 2 at a time on 2 CPUs, "
        "55,000 training images, held-out 5,000 steer"
    )
    assert _start_line(recorded, QUARTER_GPU, 4, 60_000, 0, time_budget=600.0, trials=1) == (
        "search: up to 1 trial of at most 20 epochs, for at most 10 min, 4 at a time on "
        "4 CPUs and 1 GPU, 60,000 training images, the test set steers"
    )
    recorded.trial([0.9])
    recorded.start()
    line = _start_line(recorded, ONE_CPU, 1, 500, 50)
    assert line.startswith("resuming search: 1 of 50 trials done in 5 s, at most 20 epochs each")
    assert "1 at a time on 1 CPU, 500 training images" in line


def test_the_view_shows_counts_best_baseline_and_the_running(recorded: RecordedSearch) -> None:
    nothing = ["trials    0 of 50 done, 0 running", "epochs    0", "time      3 min 20 s"]
    assert _view(recorded) == ["search", *nothing]
    recorded.trial([0.96, 0.95], [0.97, 0.96])
    recorded.trial([0.98], [0.975], state="stopped", lr=0.05)
    recorded.trial([0.5], state="failed", reason="RuntimeError: no such device")
    recorded.epoch(recorded.start(lr=0.031234, dropout=0.0), 0.955)
    recorded.start()
    recorded.diverged_epoch(recorded.start())
    assert _view(recorded) == [
        "search",
        "trials    3 of 50 done (1 complete, 1 stopped, 1 failed), 3 running",
        "epochs    6",
        "time      3 min 20 s",
        "best      val 98.00%, test 97.50%  trial 1 at epoch 1",
        "baseline  val 96.00%, test 97.00%  trial 0 at epoch 1",
        "failed    trial 2: RuntimeError: no such device",
        "",
        "trial    epoch      val  s/epoch  differs from the baseline in",
        "    3     1/20   95.50%      2.5  lr 0.0312, dropout 0",
        "    4     0/20        -        -  as the baseline",
        "    5     1/20        -        2  as the baseline",
    ]


def test_only_what_was_measured_and_steers_is_shown(recorded: RecordedSearch) -> None:
    recorded.epoch(recorded.start(), math.nan, 0.97)
    recorded.diverged_epoch(recorded.start())
    view = _view(recorded, metric="test_accuracy")
    assert "best      test 97.00%  trial 0 at epoch 1" in view
    assert view[-2].split()[:4] == ["0", "1/20", "97.00%", "2.5"]
    assert view[-1].split()[:4] == ["1", "1/20", "-", "2"]


def test_a_baseline_that_is_still_to_come_is_said_to_have_no_epoch(
    recorded: RecordedSearch,
) -> None:
    recorded.trial([0.96], origin="start")
    assert "baseline  no epoch yet" in _view(recorded)


@pytest.mark.parametrize("height", [5, 8, 9, 10, 12, 30])
def test_the_view_is_no_higher_than_the_terminal(recorded: RecordedSearch, height: int) -> None:
    for _ in range(20):
        recorded.start()
    view = _view(recorded, height=height)
    assert len(view) <= max(height, 4)
    hidden = 20 - sum(line.endswith("as the baseline") for line in view)
    if height >= 9 and hidden:
        assert view[-1].strip() == f"and {hidden} more"


def test_a_line_is_cut_where_the_terminal_is_narrow(recorded: RecordedSearch) -> None:
    recorded.start(lr=0.012345, momentum=0.812345, dropout=0.212345, weight_decay=0.000123)
    file = io.StringIO()
    view = live_view(tally_of(recorded), recorded.folder, 200.0, 30)
    Console(file=file, width=50).print(Group(view))
    lines = file.getvalue().splitlines()
    assert len(lines) == len(view.plain.splitlines())
    assert max(map(len, lines)) <= 50


def test_a_finished_trial_is_one_line_with_its_reason(recorded: RecordedSearch) -> None:
    recorded.trial([0.98, 0.97], [0.981, 0.97], state="stopped", lr=0.02, nesterov=True)
    recorded.end(recorded.start(), "failed", "RuntimeError: no such device")
    tally, trials = tally_of(recorded), recorded.history.trials
    assert finished_line(tally, trials[0], 200.0) == (
        "[3 min 20 s] 2/50 done: trial 0 stopped after 2 epochs, "
        "val 98.00%, test 98.10% at epoch 1, lr 0.02, nesterov"
    )
    assert finished_line(tally, trials[1], 9.0) == (
        "[9 s] 2/50 done: trial 1 failed (RuntimeError: no such device) after 0 epochs, "
        "no epoch to judge it by, as the baseline"
    )


class Shown:
    """A search whose Tune is the test, with its display."""

    def __init__(self, path: Path) -> None:
        self.course = Course(path / "search", trials=10, epochs=20, reduction_factor=3.0)
        self.pipe = io.StringIO()

    def show(self, console: Console | None = None) -> Progress:
        """Show it on a console, or in the pipe."""
        course, console = self.course, console or Console(file=self.pipe)
        self.progress = Progress(console, course.experiment, course.folder, lambda: course.now)
        return self.progress

    def start(self) -> Any:
        """Start a trial and return it as Tune sees it."""
        assignment = self.course.experiment.next_trial("0123abcd")
        return SimpleNamespace(config={"assignment": assignment})

    def epoch(self, trial: Any, accuracy: float = 0.97) -> Any:
        self.course.epoch(trial.config["assignment"].number, accuracy)
        return trial

    def complete(self, trial: Any) -> None:
        self.course.experiment.finish(trial.config["assignment"].number)
        self.progress.on_trial_complete(0, [], trial)

    def fail(self, trial: Any, reason: str) -> None:
        self.course.experiment.fail(trial.config["assignment"].number, reason)
        self.progress.on_trial_error(0, [], trial)

    def step(self, seconds: float = 0.0) -> None:
        """End a step of Tune's after some time."""
        self.course.now += seconds
        self.progress.on_step_end(0, [])


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shown:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.chdir(tmp_path)
    return Shown(tmp_path)


@pytest.fixture
def terminal(search: Shown) -> Terminal:
    return Terminal()


def test_without_a_terminal_every_finished_trial_is_a_line(search: Shown) -> None:
    search.show()
    baseline = search.start()
    search.course.now += 60
    search.epoch(baseline, 0.98)  # takes a second
    search.step()
    assert search.pipe.getvalue() == ""
    search.complete(baseline)
    search.fail(search.start(), "RuntimeError: [b]no[/b] such device")
    search.progress.on_trial_complete(0, [], search.start())  # interrupted, so not finished
    first, second = search.pipe.getvalue().splitlines()
    assert first == (
        "[1 min 01 s] 1/10 done: trial 0 stopped after 1 epoch, "
        "val 98.00%, test 98.00% at epoch 1, as the baseline"
    )
    assert "2/10 done: trial 1 failed (RuntimeError: [b]no[/b] such device)" in second


@pytest.mark.parametrize(
    ("variable", "value"), [("FORCE_COLOR", "1"), ("TTY_COMPATIBLE", "1"), ("TERM", "dumb")]
)
def test_a_pipe_and_a_dumb_terminal_get_plain_lines_whatever_colours_are_asked_for(
    search: Shown, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    terminal = Terminal()
    with closing(search.show(terminal.console if value == "dumb" else None)):
        trial = search.epoch(search.start())
        search.step()
        search.complete(trial)
    shown = search.pipe.getvalue() or terminal.getvalue()
    assert shown.replace("\n", "").isprintable()
    assert shown.count("\n") == 1


def test_a_terminal_shows_the_search_and_is_left_clean(search: Shown, terminal: Terminal) -> None:
    with closing(search.show(terminal.console)):
        trial = search.start()
        search.step()
        assert terminal.screen[:2] == ["search", "trials    0 of 10 done, 1 running"]
        search.epoch(trial, 0.98)
        search.step()
        screen = terminal.screen
        assert "best      val 98.00%, test 98.00%  trial 0 at epoch 1" in screen
        assert screen[-1].split()[:4] == ["0", "1/20", "98.00%", "2.5"]
        search.complete(trial)
        search.step(1)
        assert terminal.screen[1] == "trials    1 of 10 done (1 stopped), 0 running"
    assert terminal.screen == []
    shown = terminal.getvalue()
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)
    search.progress.close()
    search.step(10)
    search.complete(search.epoch(search.start()))
    assert terminal.getvalue() == shown  # closed, it shows nothing more


def test_without_colours_nothing_is_coloured(
    search: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    with closing(search.show(terminal.console)):
        search.fail(search.start(), "RuntimeError")
        search.step()
        assert "failed    trial 0: RuntimeError" in terminal.screen
        assert not re.search(r"\x1b\[[\d;]*3\dm", terminal.getvalue())


def test_the_view_is_drawn_at_most_four_times_a_second(search: Shown, terminal: Terminal) -> None:
    with closing(search.show(terminal.console)):
        terminal.news()
        drawn = 0
        for _ in range(1000):  # ten seconds
            search.step(0.01)
            drawn += bool(terminal.news())
    assert 35 <= drawn <= 41


def test_a_terminal_made_narrower_shows_no_remains(search: Shown, terminal: Terminal) -> None:
    with closing(search.show(terminal.console)):
        search.start()
        search.step()
        lengths = [len(line) for line in terminal.screen]
        terminal.console.size = ConsoleDimensions(30, 30)
        search.step(1)
        wrapped = sum((length - 1) // 30 for length in lengths if length)
        assert wrapped > 0
        # Up over the lines that the terminal wrapped, then over the view's own.
        assert terminal.getvalue().count("\x1b[1A") == wrapped + len(lengths) - 1


def test_if_the_display_fails_the_search_continues(
    search: Shown, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    search.show()
    monkeypatch.setattr(search.pipe, "write", Mock(side_effect=BrokenPipeError(32, "Broken pipe")))
    for accuracy in (0.9, 0.8, 0.7):
        search.complete(search.epoch(search.start(), accuracy))
        search.step(5)
    assert capsys.readouterr().err.count("the display failed (") == 1
    assert rows_in(search.course.folder.trials) == 3


def rows_in(table: Path) -> int:
    return len(table.read_text().splitlines()) - 1


def test_the_tables_are_there_from_the_start_and_follow_what_happens(search: Shown) -> None:
    search.show()
    search.step()
    folder = search.course.folder
    assert rows_in(folder.trials) == rows_in(folder.best) == 0
    search.epoch(search.start())  # takes a second
    search.step(0.9)
    assert rows_in(folder.trials) == 0
    search.step(0.2)
    assert rows_in(folder.best) == 1
    folder.trials.unlink()
    search.step(1000)
    assert not folder.trials.exists()  # nothing has happened
    folder.trials.mkdir()
    search.epoch(search.start())
    with pytest.raises(OSError, match="directory"):
        search.step(1000)


def test_writing_tables_takes_at_most_a_hundredth_of_the_time(
    search: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write_slowly(*_: Any) -> None:
        search.course.now += 0.5
        written.append(search.course.now)

    monkeypatch.setattr(module, "write_tables", write_slowly)
    search.show()
    trial, began = search.start(), search.course.now
    while search.course.now < began + 200:
        search.epoch(trial)
        search.step()
    assert 1 < len(written) <= 5
