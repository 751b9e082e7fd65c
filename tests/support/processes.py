"""Python code in a process of its own, which a test kills."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_TESTS = Path(__file__).parents[1]


@contextlib.contextmanager
def running(code: str, *arguments: object) -> Iterator[str]:
    """Run code until it has printed a line, return that line, and kill the process at the end.

    The code can import what tests can; its arguments are in `sys.argv[1:]`.
    """
    start = f"import sys; from pathlib import Path; sys.path.insert(0, {str(_TESTS)!r})\n"
    command = [sys.executable, "-c", start + code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline()
        finally:
            process.kill()
