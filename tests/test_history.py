import json
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.processes import running
from support.recorded import RecordedSearch

from tune_mnist.errors import RunFolderError
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import COLUMNS, EpochRow, History
from tune_mnist.runs.ranking import ranked_trials
from tune_mnist.runs.tables import trials_table

WHOLE = ("trial", "epoch", "test_correct", "diverged_step")


@pytest.fixture
def search(tmp_path: Path) -> RecordedSearch:
    """Two finished trials and one under way, in a session that was killed."""
    search = RecordedSearch(tmp_path)
    search.trial([0.9, 0.95], lr=0.01)
    search.trial([0.5], state="stopped", reason="among the poorer ones", lr=0.1)
    search.start(lr=1 / 3)
    search.epoch(2, 0.97)
    return search


def assert_same(one: History, other: History) -> None:
    names = ("trials", "rows", "elapsed", "closed_as", "sessions")
    first, second = (  # as text: there NaN is equal to itself
        repr(([getattr(each, name) for name in names], each.unfinished())) for each in (one, other)
    )
    assert first == second


def test_a_history_is_read_as_it_was_written(search: RecordedSearch) -> None:
    search.history.rerun_trial(2, 20.0, ray_id="next", error="the worker died:\n ☠ \u2028 \x1f")
    search.diverged_epoch(2)
    search.end(2, "diverged", "the loss was not finite")
    search.history.end_trial(search.start(), 40.0, "failed", "out of memory")
    assert_same(History.load(search.folder), search.history)
    search.history.close_session("SIGTERM", 50.0)
    loaded = History.load(search.folder)
    assert_same(loaded, search.history)
    assert loaded.closed_as == "SIGTERM"
    assert loaded.elapsed == 50.0
    assert [record.state for record in loaded.trials.values()] == [
        "complete", "stopped", "diverged", "failed"
    ]  # fmt: skip
    assert loaded.trials[2].retries == 1
    assert len(loaded.trials[2].finite_rows) == 1


@pytest.mark.parametrize("unfinished", [b"3", b"2,2,0.5,", b"\xff", b"\x00" * 50])
def test_a_row_that_was_never_finished_does_not_count(
    search: RecordedSearch, unfinished: bytes
) -> None:
    with search.folder.epochs.open("ab") as file:
        file.write(unfinished)
    with search.folder.events.open("ab") as file:
        file.write(b'{"event": "end", "trial": 2')
    assert_same(History.load(search.folder), search.history)


def random_row(generator: random.Random) -> EpochRow:
    values: dict[str, Any] = {
        column: generator.randrange(1, 10_000)
        if column in WHOLE
        else generator.choice([0.0, 5e-324, generator.random()])
        for column in COLUMNS
    }
    special = (math.nan, math.inf, -math.inf, -0.0, 1.7976931348623157e308)
    losses = {column: generator.choice(special) for column in COLUMNS if column.endswith("loss")}
    missing = {name: generator.choice([math.nan, 1 / 3]) for name in ("val_accuracy", "seconds")}
    step = generator.choice([None, values["diverged_step"]])
    return EpochRow(**values | losses | missing | {"diverged_step": step})


def test_a_row_is_read_to_the_last_digit() -> None:
    generator = random.Random(0)
    for _ in range(2000):
        row = random_row(generator)
        assert repr(EpochRow.parse(row.line())) == repr(row)
    kinds: dict[type, Any] = {int: np.int64, float: np.float64, type(None): lambda _: None}
    as_numpy = {column: kinds[type(value)](value) for column, value in vars(row).items()}
    assert EpochRow(**as_numpy).line() == row.line()


def check_damage(
    search: RecordedSearch, path: Path, line: int, change: Callable[[str], str], reason: str
) -> None:
    lines = path.read_text().splitlines(keepends=True)
    lines[line - 1] = change(lines[line - 1])
    path.write_bytes("".join(lines).encode("latin-1"))
    expected = rf"^.*{path} is damaged in line {line} \(.*{re.escape(reason)}.*\Z"
    with pytest.raises(RunFolderError, match=expected):
        History.load(search.folder)


@pytest.mark.parametrize(
    ("line", "content", "reason"),
    [
        (2, "{", ""),
        (2, "7", "an event was expected"),
        (2, "[]", "an event was expected"),
        (2, "{}", "an event was expected"),
        (2, "[" * 100_000, ""),
        (3, "\xff", "codec can't decode"),
        (3, "\x00" * 40, ""),
        (4, '{"event": "promoted", "trial": 0}', "a newer one wrote it"),
    ],
)
def test_a_damaged_event_is_named_by_file_and_line(
    search: RecordedSearch, line: int, content: str, reason: str
) -> None:
    check_damage(search, search.folder.events, line, lambda _: f"{content}\n", reason)


@pytest.mark.parametrize(
    ("line", "name", "value", "reason"),
    [
        (2, "trial", 7, "trial 7 follows 0 trials"),
        (4, "trial", 0, "trial 0 follows 1 trials"),
        (2, "config", {"lr": math.inf}, "lr: must be > 0 and <= 10"),
        (2, "config", {"x" * 10_000: 1}, "unknown hyperparameter"),
        (2, "origin", "nowhere", "origin cannot be 'nowhere'"),
        (3, "trial", 5, "no trial 5 has started"),
        (3, "state", "running", "state cannot be 'running'"),
        (3, "elapsed", math.nan, "elapsed must be"),
    ],
)
def test_a_fact_that_cannot_be_is_named_by_file_and_line(
    search: RecordedSearch, line: int, name: str, value: Any, reason: str
) -> None:
    def change(content: str) -> str:
        return json.dumps(json.loads(content) | {name: value}) + "\n"

    check_damage(search, search.folder.events, line, change, reason)


@pytest.mark.parametrize(
    ("line", "change", "reason"),
    [
        (1, lambda text: "trial,epoch\n", "another version"),
        (1, lambda text: text.replace("\n", ",gpu_hours\n"), "another version"),
        (2, lambda text: "\n", "cells were expected"),
        (2, lambda text: text.replace("0.9", "high"), "could not convert"),
        (2, lambda text: "\xff" + text, "codec can't decode"),
        (3, lambda text: text.replace("0,2,", "0,1,", 1), "epoch 1 of trial 0 follows epoch 1"),
        (3, lambda text: text.replace("0,2,", "0,3,", 1), "epoch 3 of trial 0 follows epoch 1"),
        (3, lambda text: text.replace("0,2,", "9,2,", 1), "no trial 9 has started"),
        (3, lambda text: text.replace("0,2,", ",2,", 1), "trial is missing"),
        (2, lambda text: text.replace("0.9", "1.9"), "val_accuracy must be >= 0 and <= 1"),
        (2, lambda text: text.replace(",2.0,", ",1e300,"), "seconds must be"),
        (2, lambda text: re.sub(",[^,]*$", ",nan", text) + "\n", "elapsed must be"),
        (2, lambda text: text.replace("0,1,", "0,1" + "0" * 19 + ",", 1), "epoch must be"),
    ],
)
def test_a_damaged_epoch_is_named_by_file_and_line(
    search: RecordedSearch, line: int, change: Callable[[str], str], reason: str
) -> None:
    check_damage(search, search.folder.epochs, line, change, reason)


def test_epochs_that_a_finished_trial_has_lost_are_noticed_and_the_way_out_leads_out(
    search: RecordedSearch,
) -> None:
    epochs = search.folder.epochs.read_text().splitlines(keepends=True)
    search.folder.epochs.unlink()
    with pytest.raises(RunFolderError, match="has 0 of the 2 epochs"):
        History.load(search.folder)
    search.folder.epochs.write_text("".join(epochs[:2]))
    with pytest.raises(RunFolderError, match="has 1 of the 2 epochs of trial 0, which has ended"):
        History.load(search.folder)
    events = search.folder.events.read_text().splitlines(keepends=True)
    kept = [line for line in events if json.loads(line)["event"] != "end"]
    search.folder.events.write_text("".join(kept))
    history = History.load(search.folder)
    assert [record.epochs for record in history.unfinished()] == [1, 0, 0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(b', "epochs": 2}', b"}", id="the first version"),
        pytest.param(b'{"event"', b'{"mood": "good", "event"', id="a newer version"),
        pytest.param(b"\n", b"\r\n", id="line ends of Windows"),
    ],
)
def test_what_others_write_otherwise_is_read(
    search: RecordedSearch, old: bytes, new: bytes
) -> None:
    for path in (search.folder.epochs, search.folder.events):
        before = path.read_bytes()
        path.write_bytes(before.replace(old, new))
    assert path.read_bytes() != before
    assert_same(History.load(search.folder), search.history)


def test_a_file_that_cannot_be_read_is_no_empty_history(search: RecordedSearch) -> None:
    search.folder.events.unlink()
    search.folder.events.mkdir()
    with pytest.raises(RunFolderError, match=r"events.jsonl cannot be read \(it is not a plain"):
        History.load(search.folder)


def test_readers_may_read_while_the_driver_writes(tmp_path: Path) -> None:
    code = """
from support.recorded import RecordedSearch
search = RecordedSearch(Path(sys.argv[1]))
print(flush=True)
while True:
    search.trial([0.5, 0.6, 0.7])
"""
    folder = RunFolder(tmp_path / "search")
    lengths = [0]
    with running(code, tmp_path):
        until = time.monotonic() + 60
        while len(set(lengths)) < 5 and time.monotonic() < until:
            lengths.append(len(History.load(folder).rows))
    assert len(set(lengths)) == 5
    assert lengths == sorted(lengths)
    History.load(folder)


def test_two_thousand_trials_are_read_and_ranked_within_seconds(tmp_path: Path) -> None:
    search = RecordedSearch(tmp_path)
    search.trial([0.5] * 20)
    start = search.folder.events.read_text().splitlines()
    rows = search.folder.epochs.read_text().splitlines()
    events, epochs = start[:1], rows[:1]
    for number in range(2000):
        events += [line.replace('"trial": 0', f'"trial": {number}') for line in start[1:]]
        epochs += [f"{number}{row[1:]}" for row in rows[1:]]
    search.folder.events.write_text("\n".join(events) + "\n")
    search.folder.epochs.write_text("\n".join(epochs) + "\n")
    before = time.process_time()
    history = History.load(search.folder)
    assert time.process_time() - before < 5
    assert len(history.rows) == 40_000
    before = time.process_time()
    table = trials_table(ranked_trials(history, "val_accuracy"), "val_accuracy")
    assert time.process_time() - before < 1.0  # 0.1 s on an idle core
    assert len(table) == 2000
