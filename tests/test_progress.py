import io
import math
import os
import pty
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import FrozenTrial
from rich.console import Console, ConsoleDimensions
from support.epochs import epoch_metrics
from support.recorded import read_table

from tune_mnist.runs.checkpoints import Checkpoints
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History
from tune_mnist.runs.space import load_space
from tune_mnist.runs.tables import write_tables
from tune_mnist.tuning import live_view as module
from tune_mnist.tuning.experiment import Experiment, Rules
from tune_mnist.tuning.live_view import Progress
from tune_mnist.tuning.study import SamplerSettings, Study
from tune_mnist.tuning.study_file import StudyFile

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Clock:
    """A clock that a test turns by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class NoMirror(StudyFile):
    """Stands for study.db, whose making takes seconds and which nobody reads here."""

    def __init__(self) -> None:
        pass

    def put(self, trial: FrozenTrial) -> None:
        pass

    def close(self) -> str | None:
        return None


def _study() -> Study:
    return Study(SamplerSettings(0, 10), "val_accuracy", NoMirror())


@dataclass
class Search:
    """A search whose Tune is the test."""

    experiment: Experiment
    folder: RunFolder
    clock: Clock

    def start(self, progress: Progress) -> Any:
        """Start a trial and return what Tune knows it by."""
        assignment = self.experiment.next_trial("0123abcd")
        trial = SimpleNamespace(config={"assignment": assignment})
        progress.on_trial_start(0, [], trial)  # type: ignore[arg-type]
        return trial

    def epoch(self, trial: Any, accuracy: float) -> None:
        number = trial.config["assignment"].number
        metrics = epoch_metrics(self.experiment.history.trials[number].epochs + 1, accuracy)
        self.experiment.report(number, metrics, b"state", None)

    def complete(self, progress: Progress, trial: Any) -> None:
        self.experiment.finish(trial.config["assignment"].number)
        progress.on_trial_complete(0, [], trial)

    def fail(self, progress: Progress, trial: Any, reason: str) -> None:
        self.experiment.fail(trial.config["assignment"].number, reason)
        progress.on_trial_error(0, [], trial)


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Search]:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.chdir(tmp_path)
    rules = Rules(
        space=load_space("sgd"),
        metric="val_accuracy",
        trials=10,
        epochs=20,
        time_budget=math.inf,
        grace_epochs=1,
        reduction_factor=3.0,
        startup_trials=10,
        seed=0,
    )
    folder = RunFolder.create(tmp_path / "search")
    history, clock = History(folder), Clock()
    history.open_session({})
    experiment = Experiment(rules, history, _study(), Checkpoints(folder), clock)
    yield Search(experiment, folder, clock)
    experiment.close("finished")


class Terminal:
    """A pseudo-terminal and what is on it, for all that rich's live view does."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self._file = os.fdopen(slave, "w", encoding="utf-8")
        self.console = Console(file=self._file, width=100, height=30)
        self.received = ""

    def read(self) -> str:
        """Return what was written since the last time."""
        self._file.flush()
        os.set_blocking(self._master, False)
        new = b""
        try:
            while chunk := os.read(self._master, 65536):
                new += chunk
        except BlockingIOError:
            pass
        self.received += new.decode()
        return new.decode()

    @property
    def screen(self) -> list[str]:
        """What a person sees, without blank lines at the end."""
        self.read()
        lines, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", self.received):
            if part == "\r":
                column = 0
            elif part == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif part.endswith("A") and part.startswith("\x1b"):
                row = max(row - int(part[2:-1] or 1), 0)
            elif part == "\x1b[2K":
                lines[row] = ""
            elif not part.startswith("\x1b"):
                lines[row] = lines[row][:column].ljust(column) + part
                column += len(part)
        while lines and not lines[-1].strip():
            lines.pop()
        return lines

    def close(self) -> None:
        self._file.close()
        os.close(self._master)


@pytest.fixture
def terminal(search: Search) -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _piped(search: Search) -> tuple[Progress, Console]:
    console = Console(file=io.StringIO())
    progress = Progress(console, search.clock)
    progress.watch(search.experiment, search.folder)
    return progress, console


def test_without_a_terminal_every_finished_trial_is_a_line(search: Search) -> None:
    progress, console = _piped(search)
    baseline = search.start(progress)
    search.clock.now += 61
    search.epoch(baseline, 0.98)
    progress.on_step_end(0, [])
    assert _text(console) == ""
    search.complete(progress, baseline)
    search.fail(progress, search.start(progress), "RuntimeError: [b]no[/b] such device")
    first, second = _text(console).splitlines()
    assert first == (
        "[1 min 01 s] 1/10 done: trial 0 stopped after 1 epoch, "
        "val 98.00%, test 98.00% at epoch 1, as the baseline"
    )
    assert "2/10 done: trial 1 failed (RuntimeError: [b]no[/b] such device)" in second


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_pipe_gets_no_control_characters_whatever_colours_are_asked_for(
    search: Search, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    progress, console = _piped(search)
    trial = search.start(progress)
    search.epoch(trial, 0.98)
    progress.on_step_end(0, [])
    search.complete(progress, trial)
    progress.close()
    assert _text(console).replace("\n", "").isprintable()
    assert _text(console).count("\n") == 1


def test_a_dumb_terminal_gets_lines(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    with Progress(terminal.console, search.clock) as progress:
        progress.watch(search.experiment, search.folder)
        trial = search.start(progress)
        progress.on_step_end(0, [])
        search.complete(progress, _with_epoch(search, trial))
    assert terminal.read().replace("\r\n", "").isprintable()
    terminal.close()


def _with_epoch(search: Search, trial: Any) -> Any:
    search.epoch(trial, 0.97)
    return trial


def test_a_trial_that_was_broken_off_is_no_finished_one(search: Search) -> None:
    progress, console = _piped(search)
    trial = search.start(progress)
    progress.on_trial_complete(0, [], trial)  # without a final state in the history
    assert _text(console) == ""


def test_a_terminal_shows_the_search_and_is_left_clean(search: Search, terminal: Terminal) -> None:
    with Progress(terminal.console, search.clock) as progress:
        progress.watch(search.experiment, search.folder)
        trial = search.start(progress)
        progress.on_step_end(0, [])
        assert terminal.screen[:2] == ["search", "trials    0 of 10 done, 1 running"]
        search.epoch(trial, 0.98)
        search.clock.now += 1
        progress.on_step_end(0, [])
        screen = terminal.screen
        assert "best      val 98.00%, test 98.00%  trial 0 at epoch 1" in screen
        assert screen[-1].split()[:4] == ["0", "1/20", "98.00%", "2.5"]
        search.complete(progress, trial)
        search.clock.now += 1
        progress.on_step_end(0, [])
        assert terminal.screen[1] == "trials    1 of 10 done (1 stopped), 0 running"
    assert terminal.screen == []
    assert terminal.received.rindex(SHOW_CURSOR) > terminal.received.rindex(HIDE_CURSOR)


def test_without_colours_nothing_is_coloured(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    with Progress(terminal.console, search.clock) as progress:
        progress.watch(search.experiment, search.folder)
        search.fail(progress, search.start(progress), "RuntimeError")
        progress.on_step_end(0, [])
        assert "failed    trial 0: RuntimeError" in terminal.screen
    assert not re.search(r"\x1b\[[\d;]*3\dm", terminal.received)
    terminal.close()


def test_an_error_leaves_the_terminal_clean_too(search: Search, terminal: Terminal) -> None:
    with pytest.raises(KeyboardInterrupt), Progress(terminal.console, search.clock) as progress:
        progress.watch(search.experiment, search.folder)
        search.start(progress)
        progress.on_step_end(0, [])
        raise KeyboardInterrupt
    assert terminal.screen == []


def test_closing_twice_or_unopened_does_nothing(search: Search, terminal: Terminal) -> None:
    Progress(terminal.console, search.clock).close()
    progress = Progress(terminal.console, search.clock)
    progress.watch(search.experiment, search.folder)
    progress.close()
    terminal.read()
    progress.close()
    search.clock.now += 10
    progress.on_step_end(0, [])
    search.complete(progress, _with_epoch(search, search.start(progress)))
    assert terminal.read() == ""


def test_the_view_is_drawn_at_most_four_times_a_second(search: Search, terminal: Terminal) -> None:
    with Progress(terminal.console, search.clock) as progress:
        progress.watch(search.experiment, search.folder)
        terminal.read()
        drawn = 0
        for _ in range(1000):  # ten seconds
            search.clock.now += 0.01
            progress.on_step_end(0, [])
            drawn += bool(terminal.read())
    assert 35 <= drawn <= 41


def test_a_terminal_made_narrower_shows_no_remains(search: Search, terminal: Terminal) -> None:
    with Progress(terminal.console, search.clock) as progress:
        progress.watch(search.experiment, search.folder)
        search.start(progress)
        progress.on_step_end(0, [])
        height = len(terminal.screen)
        lengths = [len(line) for line in terminal.screen]
        terminal.console.size = ConsoleDimensions(30, 30)
        search.clock.now += 1
        progress.on_step_end(0, [])
        terminal.read()
        wrapped = sum((length - 1) // 30 for length in lengths if length)
        assert wrapped > 0
        # Up over the lines that the terminal wrapped, then over the view's own.
        assert terminal.received.count("\x1b[1A") == wrapped + height - 1


def test_a_display_that_fails_is_given_up_and_the_search_goes_on(
    search: Search, capsys: pytest.CaptureFixture[str]
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    progress = Progress(Console(file=Closed()), search.clock)
    progress.watch(search.experiment, search.folder)
    for accuracy in (0.9, 0.8, 0.7):
        trial = search.start(progress)
        search.epoch(trial, accuracy)
        search.complete(progress, trial)
        search.clock.now += 5
        progress.on_step_end(0, [])
    assert capsys.readouterr().err.count("the display failed (") == 1
    assert len(read_table(search.folder.trials)) == 3


def test_the_tables_are_there_from_the_start_and_grow(search: Search) -> None:
    progress, _ = _piped(search)
    progress.on_step_end(0, [])
    assert len(read_table(search.folder.trials)) == len(read_table(search.folder.best)) == 0
    search.epoch(search.start(progress), 0.9)
    search.clock.now += 1.9
    progress.on_step_end(0, [])
    assert len(read_table(search.folder.trials)) == 0
    search.clock.now += 0.2
    progress.on_step_end(0, [])
    assert len(read_table(search.folder.best)) == 1


def test_writing_tables_takes_at_most_a_hundredth_of_the_time(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write_slowly(*arguments: Any) -> None:
        write_tables(*arguments)
        search.clock.now += 0.5
        written.append(search.clock.now)

    monkeypatch.setattr(module, "write_tables", write_slowly)
    progress, _ = _piped(search)
    trial, began = search.start(progress), search.clock.now
    while search.clock.now < began + 200:
        search.epoch(trial, 0.9)
        search.clock.now += 1
        progress.on_step_end(0, [])
    assert 0.5 * (len(written) - 1) <= 2.0


def test_tables_are_left_alone_while_nothing_happens(search: Search) -> None:
    progress, _ = _piped(search)
    progress.on_step_end(0, [])
    search.folder.trials.unlink()
    search.clock.now += 1000
    progress.on_step_end(0, [])
    assert not search.folder.trials.exists()


def test_tables_that_cannot_be_written_end_the_search(search: Search) -> None:
    progress, _ = _piped(search)
    search.folder.trials.mkdir()
    with pytest.raises(OSError, match="directory"):
        progress.on_step_end(0, [])


def test_a_resumed_search_shows_what_was_done_before(search: Search, terminal: Terminal) -> None:
    first, _ = _piped(search)
    search.complete(first, _with_epoch(search, search.start(first)))
    search.epoch(search.start(first), 0.98)
    before = search.experiment
    before.close("SIGINT")
    history = History.load(search.folder)
    history.open_session({})
    rules = replace(before.rules, trials=12)
    again = Experiment(rules, history, _study(), Checkpoints(search.folder), search.clock)
    search.experiment = again
    with Progress(terminal.console, search.clock) as progress:
        progress.watch(again, search.folder)
        progress.on_step_end(0, [])
        assert terminal.screen[1:3] == [
            "trials    1 of 12 done (1 stopped), 0 running",
            "epochs    2",
        ]
        search.start(progress)
        search.clock.now += 1
        progress.on_step_end(0, [])
        assert terminal.screen[-1].split()[:2] == ["1", "1/20"]
    again.close("finished")
