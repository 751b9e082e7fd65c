"""A front door as a process: its child's deaths, its signals, its streams."""

import itertools
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.drivers import epochs_in
from support.processes import TESTS, environment, python, shell

BY_RAY = "Ray ended the search (exit code 1), as it does when one of its own processes was killed"
BY_KERNEL = "the search was ended by SIGKILL, which is likely for want of memory"


@contextmanager
def started(*arguments: object, module: str = "support.door") -> Iterator[subprocess.Popen[str]]:
    """Begin a front door in a process group of its own."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup ignores
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def outcome(ways: str, run: Path) -> tuple[int, list[str], str]:
    """Return the exit code, which lives there were and whether they resumed, and what was said."""
    with started("--ways", ways, "--run", run) as process:
        out, err = process.communicate(timeout=60)
    lives = [line.rsplit(" ", 1)[0].replace(str(run), "RUN") for line in out.splitlines()]
    return process.returncode, lives, err.replace(str(run), "RUN")


@pytest.mark.parametrize(
    ("ways", "code", "lives", "said"),
    [
        ("done", 0, 1, []),
        ("error", 1, 1, ["error: no luck"]),
        ("exit,done", 0, 2, [f"{BY_RAY}; resuming RUN"]),
        ("kill,done", 0, 2, [f"{BY_KERNEL}; resuming RUN"]),
        ("crash,error", 1, 2, ["the search was ended by SIGABRT; resuming RUN", "error: no luck"]),
        ("exit,exit,exit,exit,done", 0, 5, [f"{BY_RAY}; resuming RUN"] * 4),
        (
            "exit,idle,idle,idle,idle",
            *(1, 5),
            [f"{BY_RAY}; resuming RUN"] * 4
            + [
                f"error: {BY_RAY} 4 times without a finished epoch; nothing is lost: continue "
                "with resume RUN"
            ],
        ),
        ("early", 1, 1, [f"error: {BY_RAY}; nothing is lost: continue with the same command"]),
    ],
)
def test_what_ends_without_a_word_is_told_and_resumed(
    ways: str, code: int, lives: int, said: list[str], tmp_path: Path
) -> None:
    expected = [
        f"{life} {way} {'RUN' if life else None}" for life, way in enumerate(ways.split(","))
    ]
    assert outcome(ways, tmp_path) == (code, expected[:lives], "".join(f"{s}\n" for s in said))


def children(process: int) -> Iterator[tuple[int, str]]:
    """The processes that one has started, each with its command."""
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        yield int(child), Path(f"/proc/{child}/cmdline").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["raylet/raylet", "gcs_server"])
def test_a_search_whose_ray_is_killed_says_so_and_is_resumed(killed: str, tmp_path: Path) -> None:
    small = "--space sgd --images 1000 --trials 12 --epochs 8 --grace-epochs 8 --no-report"
    place = ("--results-dir", tmp_path, "--run", "run")
    with started(*small.split(), *place, module="support.scripted_search") as process:
        while epochs_in(tmp_path / "run") < 8:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        ((driver, _),) = children(process.pid)
        (found,) = (child for child, command in children(driver) if killed in command)
        os.kill(found, signal.SIGKILL)
        out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, f"{BY_RAY}; resuming {tmp_path / 'run'}\n")
    assert "Trials: 12 complete" in out
    assert epochs_in(tmp_path / "run") == 12 * 8


# Seconds after the start, and the files by then: imports, Ray's start, the session, its end.
@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1, 2, 3, 4, 6, 8, 10, 13])
def test_two_signals_end_a_search_at_once_at_any_moment(seconds: float, tmp_path: Path) -> None:
    pair = ("SIGTERM", "SIGINT") if seconds % 2 else ("SIGINT", "SIGINT")
    small = ("--space", "sgd", "--images", "1000", "--trials", "4", "--results-dir", tmp_path)
    with started(*small, module="support.scripted_search") as process:
        time.sleep(seconds)
        for name in pair:
            os.killpg(process.pid, signal.Signals[name])
            time.sleep(0.2)
        _, err = process.communicate(timeout=30)
    if process.returncode:
        assert process.returncode == 128 + signal.Signals[pair[0]]
        assert re.fullmatch(r"(interrupted\n|ended at once; continue with .*\n)?", err)
    else:
        assert err == ""  # it had ended before


def test_a_bug_keeps_its_traceback_and_is_not_repeated(tmp_path: Path) -> None:
    code, lives, said = outcome("bug,done", tmp_path)
    assert (code, len(lives)) == (1, 1)
    assert said.startswith("Traceback")
    assert said.endswith("ZeroDivisionError\n")


def test_an_import_that_fails_keeps_its_traceback_too(tmp_path: Path) -> None:
    (tmp_path / "cyclopts.py").write_text("raise ImportError('broken')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = python("-m", "tune_mnist.search", env=environment(PYTHONPATH=path))
    assert done.returncode == 1
    assert done.stderr.endswith("ImportError: broken\n")


def begun(process: subprocess.Popen[str]) -> int:
    """Wait until the work has begun; return the child's process number."""
    assert process.stdout is not None
    child = int(process.stdout.readline().split()[-1])
    assert process.stdout.readline() == "ready\n"
    return child


STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
EVERYDAY = {(signal.SIGINT, True, "wait"), (signal.SIGTERM, False, "order")}
EVERYDAY |= {(signal.SIGHUP, True, "order")}


@pytest.mark.parametrize(
    ("number", "to_group", "way"),
    [
        pytest.param(*each, marks=() if each in EVERYDAY else pytest.mark.slow)
        for each in itertools.product(STOPPING, (True, False), ("order", "wait"))
    ],
)
def test_a_signal_ends_the_work_whether_the_parent_alone_or_both_get_it(
    number: signal.Signals, to_group: bool, way: str, tmp_path: Path
) -> None:
    said = "interrupted\n" if way == "wait" else ""
    with started("--ways", f"{way},done", "--run", tmp_path) as process:
        begun(process)
        (os.killpg if to_group else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "", said)


@pytest.mark.parametrize(
    "first", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in STOPPING[::2])]
)
def test_a_second_signal_ends_at_once_what_does_not_end(
    first: signal.Signals, tmp_path: Path
) -> None:
    with started("--ways", "hang,done", "--run", tmp_path) as process:
        assert process.stdout is not None
        child = begun(process)
        os.killpg(process.pid, first)
        assert process.stdout.readline() == "stopping\n"
        time.sleep(0.2)  # those that come together are taken for one
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + first
    assert err == f"ended at once; continue with resume {tmp_path}\n"
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_the_work_ends_with_a_killed_parent(tmp_path: Path) -> None:
    with started("--ways", "wait", "--run", tmp_path) as process:
        assert process.stdout is not None
        child = begun(process)
        os.kill(child, 0)
        process.kill()
        assert process.stdout.read() == ""  # the child had it open, too
    assert process.returncode == -signal.SIGKILL


ARGUMENTS = {"bench": ("step", "--quick"), "search": ("--list", "--results-dir", str(TESTS))}


LOST = "warning: stdout is lost ({}); the work goes on without it\n"


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        (">&-", ""),
        ("<&- >&- 2>&-", ""),
        (">/dev/full", LOST.format("No space left on device")),
        (">/dev/full 2>&1", ""),
        ("| true", LOST.format("Broken pipe")),
        ("2>&1 | true", ""),
    ],
)
def test_a_search_outlives_its_output(streams: str, said: str, tmp_path: Path) -> None:
    done = shell(f"python -m support.door --run {tmp_path} {streams}")
    assert (done.returncode, done.stderr) == (0, said)
    assert (tmp_path / "epochs.csv").read_text() == "an epoch\n"


def test_a_search_outlives_its_terminal(tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "support.door", "--run", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=terminal, stderr=terminal, env=environment(), start_new_session=True
    ) as process:
        os.close(terminal)
        os.close(master)
    assert process.returncode == 0
    assert (tmp_path / "epochs.csv").exists()


def ready(process: subprocess.Popen[str]) -> bool:
    """Return True once a process heeds SIGTERM, or has ended."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = re.search(r"SigCgt:\s+(\w+)", status)
    return caught is None or bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(
    ("name", "milliseconds"),
    [
        *(("search", 100), ("bench", 100)),
        *(
            pytest.param(name, wait, marks=pytest.mark.slow)
            for name in ("search", "confirm", "train", "report", "predict", "bench")
            for wait in (0, 100, 400, 1200)
        ),
    ],
)
def test_a_signal_while_a_door_opens_is_one_line(name: str, milliseconds: int) -> None:
    with started(*ARGUMENTS.get(name, ()), module=f"tune_mnist.{name}") as process:
        while not ready(process):
            time.sleep(0.001)
        time.sleep(milliseconds / 1000)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert len(err.splitlines()) <= 1
    assert "Traceback" not in err
    if process.returncode == 130:
        assert re.match(r"interrupted|ended at once", err)
    else:
        assert process.returncode in (0, 2)  # it had ended before
