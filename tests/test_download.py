import io
import sys
import time
from pathlib import Path

import pytest

from tune_mnist.mnist import download
from tune_mnist.mnist.download import SourceError, run_download

SLOW = """
import sys, time
with open(sys.argv[1] + "/slow.bin", "wb", buffering=0) as file:
    for _ in range(8):
        file.write(bytes(1_000_000))
        time.sleep(0.1)
"""
STUCK = """
import sys, time
open(sys.argv[1] + "/stuck.bin", "wb").close()
time.sleep(60)
"""


def run(program: str, folder: Path, silence: float) -> list[str]:
    said: list[str] = []
    command = [sys.executable, "-c", program, str(folder / "download")]
    run_download(command, folder / "download", "*.bin", 8_000_000, silence, said.append)
    return said


def test_what_is_slow_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "SECONDS_PER_LINE", 0.2)
    said = run(SLOW, tmp_path, silence=0.5)  # it takes 0.8 seconds
    assert len(said) >= 2
    assert all(line.startswith("MNIST: ") and line.endswith("% of 8 MB") for line in said)


def test_what_falls_silent_is_stopped(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(SourceError, match="nothing came for 1 seconds"):
        run(STUCK, tmp_path, silence=0.6)
    assert time.monotonic() - started < 5


def test_what_never_begins_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "STARTUP", 0.5)
    with pytest.raises(SourceError, match="nothing came"):
        run("import time; time.sleep(60)", tmp_path, silence=60.0)


def test_a_bar_is_drawn_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert run(SLOW, tmp_path, silence=2.0) == []
    assert "/8.0 MB" in terminal.getvalue()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise SystemExit('what went wrong')", "what went wrong"),
        ("raise SystemExit(3)", "exit 3"),
        (
            "print(\"connection broken by 'no route': /x\\nERROR: no luck\")\nraise SystemExit(1)",
            r"no luck \(no route\)",
        ),
    ],
)
def test_a_failure_is_told_by_its_last_line(tmp_path: Path, program: str, reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        run(program, tmp_path, silence=5.0)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere does not start: No such file"):
        run_download(["nowhere"], tmp_path / "download", "*", 1, 1.0, lambda _: None)


def test_nothing_can_ask_the_user(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="EOF"):
        run("input()", tmp_path, silence=5.0)
