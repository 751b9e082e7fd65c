"""Disks that are mounted for a test: small ones, or folders in another place."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    with mount("-t", "tmpfs", "-o", options, "tmpfs", at=path):
        yield path


@contextlib.contextmanager
def mount(*arguments: str, at: Path) -> Iterator[None]:
    """Mount something; skip the test where that is not allowed."""
    command = ["mount", *arguments, str(at)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting a disk needs root: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)
