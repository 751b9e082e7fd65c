"""A front door whose work dies in every way, and needs neither Ray nor torch.

python -m support.door WAY FOLDER: each child adds an epoch to the run in the folder and ends in
the first of the ways, such as `exit,kill,done`, that no child before it has.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tune_mnist import supervise

if __name__ == "__main__":
    supervise.watch("resume {}")

from tune_mnist.cli import outlive_output, run, tell
from tune_mnist.errors import TuneMnistError


@dataclass(frozen=True)
class Settings:
    """Work, somehow."""

    ways: str = "done"
    run: Path = Path("run")


def work(settings: Settings) -> int:
    outlive_output()
    lives = settings.run / "lives"
    life = len(lives.read_text()) if lives.exists() else 0
    with lives.open("a") as file:
        file.write("x")
    way = settings.ways.split(",")[life]
    tell(f"{life} {way} {supervise.run_to_resume} {os.getpid()}")
    if way != "early":
        supervise.works_on(settings.run)
    if not way.startswith("idle"):
        with (settings.run / "epochs.csv").open("a") as file:
            file.write("an epoch\n")
    return end(way)


def print_at_once(text: str) -> None:
    os.write(1, text.encode())  # a stream may be in the middle of something


def end(way: str) -> int:
    if way in ("exit", "early", "idle"):
        os._exit(1)
    if way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "crash":
        os.abort()
    if way == "bug":
        raise ZeroDivisionError
    if way == "error":
        raise TuneMnistError("no luck")
    if way == "hang":
        with supervise.stops.acting(lambda _: print_at_once("stopping\n")):
            tell("ready")
            time.sleep(60)
    if way == "order":
        with supervise.stops.acting(lambda _: None):
            tell("ready")
            while supervise.stops.first is None:
                time.sleep(0.01)
            return 128 + supervise.stops.first
    if way == "wait":
        tell("ready")
        time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.argv[0] = "door"
    run("door", Settings, work)
