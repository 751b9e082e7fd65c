"""Runs a command that downloads: shows how far it is, and stops it when nothing comes any more."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Say = Callable[[str], None]

STARTUP = 120.0  # seconds for a command to begin: importing torch from a cold disk takes its time
SECONDS_PER_LINE = 10.0  # of progress, where there is no terminal


class SourceError(Exception):
    """A source did not deliver; the message says why."""


def run_download(
    command: list[str], download: Path, pattern: str, total: int, silence: float, say: Say
) -> None:
    """Run `command` for as long as something goes on in the folder `download`, and show how much.

    Args:
        command: writes into `download`.
        download: made here; the command's temporary files go there as well.
        pattern: of the files in it that count as downloaded.
        total: how many bytes of those are expected.
        silence: seconds without any change in the folder after which to give up.
        say: takes lines of progress.

    Raises:
        SourceError: the command could not start, failed, or fell silent.
    """
    download.mkdir()
    log = download.parent / "output.txt"
    places = {"TMPDIR": str(download), "UV_CACHE_DIR": str(download / "cache")}
    with log.open("wb") as output:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | places,
            )
        except OSError as error:
            raise SourceError(f"{command[0]} does not start: {error.strerror}") from error
    try:
        with _progress(total, say) as show:
            seen: dict[Path, int] = {}
            changed = time.monotonic()
            while child.poll() is None:
                time.sleep(0.1)
                sizes = _sizes(download)
                if sizes != seen:
                    seen, changed = sizes, time.monotonic()
                elif time.monotonic() - changed > (patience := silence if seen else STARTUP):
                    raise SourceError(f"nothing came for {patience:.0f} seconds")
                show(sum(size for file, size in seen.items() if file.match(pattern)))
    finally:
        child.kill()
        child.wait()
    if child.returncode != 0:
        raise SourceError(_why(log.read_text(errors="replace")) or f"exit {child.returncode}")


def _sizes(folder: Path) -> dict[Path, int]:
    sizes = {}
    for parent, folders, files in os.walk(folder):
        for name in folders:
            sizes[Path(parent, name)] = 0
        for name in files:
            try:
                sizes[Path(parent, name)] = Path(parent, name).stat().st_size
            except FileNotFoundError:  # temporary, and gone since
                continue
    return sizes


def _why(output: str) -> str:
    """Return what `output` says last and, where pip tried again, what made it do so."""
    *_, last = output.splitlines() or [""]
    last = last.strip().removeprefix("ERROR: ").removeprefix("cause: ")
    retried = re.search(r"connection broken by '(.+)': /", output)
    return f"{last} ({retried[1]})" if retried else last


@contextmanager
def _progress(total: int, say: Say) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, and a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done: bar.update(task, completed=min(done, total))
        return
    next_line = time.monotonic() + SECONDS_PER_LINE

    def show(done: int) -> None:
        nonlocal next_line
        if time.monotonic() > next_line:
            say(f"MNIST: {min(done, total) / total:.0%} of {total / 1e6:.0f} MB")
            next_line += SECONDS_PER_LINE

    yield show
