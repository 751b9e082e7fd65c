import contextlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import pytest
from support.processes import environment, python, shell

from tune_mnist import cli
from tune_mnist.bench import PARTS
from tune_mnist.cli import AT_LEAST_1, Interrupted, Options, exit_code, flag
from tune_mnist.errors import ConfigError, DataUnavailableError
from tune_mnist.train import TrainSettings
from tune_mnist.tuning.settings import ConfirmSettings, SearchSettings


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """Bake a cake."""

    eggs: Annotated[int, AT_LEAST_1] = 2
    """How many eggs."""

    oven_heat: float = 180.0
    """Degrees."""


def baking(arguments: str, command: Callable[[Settings], int | None] | None = None) -> int:
    return exit_code("bake", Settings, command or (lambda _: None), arguments.split())


def test_arguments_become_settings() -> None:
    seen: list[Settings] = []
    assert baking("--eggs 3 --oven-heat=200", seen.append) == 0
    assert baking("", seen.append) == 0
    assert seen == [Settings(eggs=3, oven_heat=200.0), Settings()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--egs 3", "error: Unknown option: --egs. Did you mean --eggs? (--help lists"),
        ("--eggs 0", "error: --eggs must be at least 1, but got 0"),
        ("--eggs x", 'error: Invalid value for --eggs: unable to convert "x" into int (--help'),
        ("--eggs", "error: Parameter --eggs requires an argument (--help"),
        ("3 4", "error: unexpected argument: 3 4 (--help"),
        (f"--eggs {'9' * 5000}", "error: an argument has 5,000 bytes, where 4,096 are the most"),
        (f"--eggs {'9' * 4000}", "error: --eggs must be at most 1e30, but got a number of 4000"),
        (f"--eggs {'x' * 4000}", 'error: Invalid value for --eggs: unable to convert "xxx'),
        (f"--{'x' * 4000} 3", "error: Unknown option: --xxx"),
        ("x " * 4000, "error: unexpected argument: x x"),
    ],
)
def test_arguments_that_make_no_settings_are_one_line_and_exit_code_2(
    arguments: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ran: list[Settings] = []
    assert baking(arguments, ran.append) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert len(err) < 400
    assert not ran


def numbers_of(settings: type[Any]) -> list[str]:
    """The options that take numbers."""
    hints = get_type_hints(settings)
    return [name for name, hint in hints.items() if {hint, *get_args(hint)} & {int, float}]


@pytest.mark.parametrize("number", ["9" * 400, "9" * 40, "-1", "nan", "-inf", "1e400"])
@pytest.mark.parametrize(
    ("door", "settings"),
    [
        *(("search", SearchSettings), ("confirm", ConfirmSettings), ("train", TrainSettings)),
        *PARTS.items(),
    ],
)
def test_a_number_beyond_all_reason_is_one_line_at_every_door(
    door: str, settings: type[Any], number: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in numbers_of(settings):
        code = exit_code(door, settings, lambda _: None, [f"{flag(name)}={number}"])
        out, err = capfd.readouterr()
        assert out == ""
        endless = name in ("time_budget", "hang_timeout") and float(number) == math.inf
        assert (code, err.count("\n")) == ((0, 0) if endless else (2, 1)), name


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("lr: must be\n  positive"), 2, "error: lr: must be positive\n"),
        (DataUnavailableError("no MNIST"), 1, "error: no MNIST\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Interrupted("stopped in epoch 3"), 130, "stopped in epoch 3\n"),
    ],
)
def test_errors_raised_on_purpose_are_one_line(
    error: BaseException, code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Settings) -> None:
        raise error

    assert baking("", fail) == code
    assert capfd.readouterr() == ("", message)


def test_a_bug_keeps_its_traceback_and_an_exit_code_is_passed_on() -> None:
    with pytest.raises(ZeroDivisionError):
        baking("", lambda _: 1 // 0)
    assert baking("", lambda _: 3) == 3


def test_help_says_what_each_option_is_for(capfd: pytest.CaptureFixture[str]) -> None:
    assert baking("--help") == 0
    out, err = capfd.readouterr()
    assert err == ""
    for words in ("python -m tune_mnist.bake", "Bake a cake.", "--oven-heat", "How many eggs."):
        assert words in out


DOORS = ("search", "confirm", "train", "report", "predict")
LOST = "error: cannot write to stdout (No space left on device)\n"
STREAMS = {
    # where to: exit codes of --help and of a wrong option, what --help says on stderr
    ">/dev/null": (0, 2, ""),
    ">&-": (0, 2, ""),
    "2>&-": (0, 2, ""),
    "<&- >&- 2>&-": (0, 2, ""),
    ">/dev/full": (1, 2, LOST),
    "2>/dev/full": (0, 2, ""),
    ">/dev/full 2>&1": (1, 2, ""),
    "| true": (141, 2, ""),
    "2>&1 | true": (141, 2, ""),
}


@pytest.mark.parametrize(
    ("door", "streams"),
    [
        *(("bench", streams) for streams in STREAMS),
        *(
            pytest.param(door, streams, marks=pytest.mark.slow)
            for door in DOORS
            for streams in ("<&- >&- 2>&-", ">/dev/full", "| true")
        ),
    ],
)
def test_streams_that_are_closed_full_or_broken(door: str, streams: str) -> None:
    of_help, of_error, said = STREAMS[streams]
    for argument, code in (("--help", of_help), ("--nonsense", of_error)):
        done = shell(f"python -m tune_mnist.{door} {argument} {streams}")
        assert done.returncode == code, (argument, done)
        assert "Traceback" not in done.stdout + done.stderr
        assert argument == "--nonsense" or done.stderr == said


def test_a_pipe_that_someone_made_not_block_loses_nothing() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    command = [sys.executable, "-m", "tune_mnist.bench", "--help"]
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        time.sleep(0.5)  # in which it has something to say, or says it later
        with open(reader, "rb") as pipe:  # noqa: PTH123
            said = pipe.read().lstrip(b"\0").decode()
    assert process.returncode == 0
    assert "Measure what" in said
    assert "replay" in said


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_text_can_be_printed_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    odd = tmp_path / "\N{SNOWMAN} \udcff"
    variables = environment(LC_ALL="C", PYTHONIOENCODING=encoding)
    done = python("-m", "tune_mnist.train", "--config", odd, env=variables, errors="replace")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "said"),
    [(cli.__file__, "warning: mind\n"), ("/home/me/tune_mnist/.venv/lib/torch/nn.py", "")],
)
def test_only_warnings_of_this_package_are_shown(
    file: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli._show_warning("mind", UserWarning, file)
    assert capsys.readouterr().err == said
