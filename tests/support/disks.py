"""Disks that are mounted for a test, and users without rights on one."""

import contextlib
import os
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


@contextlib.contextmanager
def as_nobody(path: Path) -> Iterator[None]:
    """Be a user who can reach the path and has no rights there; root may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    for parent in path.parents:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
