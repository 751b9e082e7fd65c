import io
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from support.reported import all_failed, empty, rich

from tune_mnist.cli import exit_code
from tune_mnist.reporting.summary import listing
from tune_mnist.tuning.launch import search
from tune_mnist.tuning.settings import SearchSettings


def _said(results: Path) -> list[str]:
    console = Console(file=io.StringIO(), width=160)
    console.print(listing(results))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_every_run_is_listed_with_its_state_its_best_and_what_it_did(tmp_path: Path) -> None:
    endings = {
        "[bold]done": "finished",
        "out": "out of time",
        "interrupted": "SIGINT",
        "killed": "",
    }
    for name, end in endings.items():
        rich(tmp_path, name, end=end)
    all_failed(tmp_path, "broken")
    running = empty(tmp_path, "running")
    with FileLock(running.folder.path / ".lock"):
        lines = _said(tmp_path)
    found = {line.split("  ")[0]: " ".join(line.split()[1:]) for line in lines[1:]}
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
    lines = _said(tmp_path)
    assert lines[1].startswith("good")
    assert "events.jsonl is damaged in line 1" in " ".join(lines[2:])


def test_the_search_command_lists_and_starts_nothing(tmp_path: Path) -> None:
    arguments = ["--list", "--results-dir", str(tmp_path / "none")]
    assert exit_code("search", SearchSettings, search, arguments) == 0
    assert not (tmp_path / "none").exists()
