"""Python in a process of its own, which a test waits for or kills."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def environment(**changes: object) -> dict[str, str]:
    """Return this process's variables with changes; None leaves one out.

    Without a change of its own, PYTHONPATH has all that tests can import.
    """
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    variables = {**os.environ, "PYTHONPATH": path, **changes}
    return {name: str(value) for name, value in variables.items() if value is not None}


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which `python` is this one, and return its first exit code."""
    line = line.replace("python", sys.executable, 1) + "; exit ${PIPESTATUS[0]}"
    command = ["bash", "-c", line]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())


def python(
    *arguments: object, prefix: tuple[str, ...] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments to its end; the options are those of subprocess.run."""
    given: dict[str, Any] = {"env": environment(), "check": False, **options}
    command = [*prefix, sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **given)


@contextlib.contextmanager
def running(code: str, *arguments: object) -> Iterator[str]:
    """Run code until it has printed a line, return that line, and kill the process at the end.

    The code can import what tests can; its arguments are in `sys.argv[1:]`.
    """
    start = "import sys; from pathlib import Path\n"
    command = [sys.executable, "-c", start + code, *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline()
        finally:
            process.kill()
