"""Chromium without a window: what a page has become once its scripts have run."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

PATIENCE = 240.0  # seconds: its drawing without a GPU is slow on a busy machine
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_SWITCHES = (
    *("--headless", "--disable-gpu", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
    "--virtual-time-budget=20000",  # of the page's own clock, ms
)


def visit(page: Path) -> tuple[str, list[str]]:
    """Return a file's DOM and what the console said; skip the test without a browser."""
    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    if browser is None:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    as_root = ("--no-sandbox",) if os.geteuid() == 0 else ()
    with tempfile.TemporaryDirectory(prefix="tm-browser-") as profile:
        done = subprocess.run(
            [
                *(browser, *_SWITCHES, *as_root, f"--user-data-dir={profile}"),
                *("--window-size=800,800", "--dump-dom", page.absolute().as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
    # How fast it draws without a GPU is the browser's matter.
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return done.stdout, [line for line in said if "GL Driver Message" not in line]
