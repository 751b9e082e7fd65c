"""Copying a run's folder as it grows, in a thread: a slow or absent storage holds up nothing.

Whatever instant the machine is lost at, the copy is a run that can be gone on with. Each round
reads the states before the events and these before the epochs, and writes them the other way
round: the copied epochs are never older than the events or the states, nor the best model than the
epochs. What is newer than the rest is dropped when the copy is fetched, or run again.
"""

import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from tune_mnist.analysis.run import RunFolder
from tune_mnist.cli import tell
from tune_mnist.tuning.claim import Claim, TakenOverError
from tune_mnist.tuning.remote import RemoteRun, in_words

COPY_EVERY = 2.0  # seconds between two rounds
COPY_SHARE = 0.2  # of the time, at most, once there is much to copy
PAUSE_AT_MOST = 15.0  # seconds: every round gives a sign of life
CLOSING_PATIENCE = 20.0  # seconds without progress to wait at the end
AT_ONCE = 8  # files under way to the storage: each waits for an answer for most of its time

_READ_FIRST = ("*.state", "events.jsonl", "epochs.csv", "best.pt")
_LOGS = ("events.jsonl", "epochs.csv")
_WRITTEN_FIRST = ("search.yaml", "best.pt", "epochs.csv", "events.jsonl", "*.state")
_Version = tuple[int, int, int]


class Copying:
    """Copies a run's folder, in a thread, for as long as a driver works on it."""

    def __init__(self, folder: RunFolder, remote: RemoteRun, claim: Claim) -> None:
        self._folder, self._remote, self._claim = folder, remote, claim
        self._copied: dict[str, _Version | None] = dict.fromkeys(remote.names())
        self._gone: set[str] = set()  # copied, and missing in the folder when last looked at
        self._steps = 0  # files written, for a sign of life
        self._failure: str | None = None
        self._warned = self._given_up = False
        self._closing = threading.Event()
        # A daemon: what hangs on a dead storage must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="storage", daemon=True)
        self._thread.start()

    def close(self) -> str | None:
        """Copy what is left.

        Returns:
            What there is to say where that could not be done, or None.
        """
        self._closing.set()
        while self._thread.is_alive() and not self._given_up:
            before = self._steps
            self._thread.join(CLOSING_PATIENCE)
            if self._thread.is_alive() and self._steps == before:
                self._given_up = True
                self._failure = self._failure or self._behind(
                    f"no answer for {CLOSING_PATIENCE:g} s"
                )
        return self._failure

    def _work(self) -> None:
        pause = COPY_EVERY
        while not self._given_up:
            closing, began = self._closing.wait(pause), time.monotonic()
            try:
                self._copy_changes(at_end=closing)
                if closing:
                    self._claim.release()
            except TakenOverError:
                self._failure = (
                    f"{self._remote.uri} is left to another driver, which took this one for dead; "
                    f"what this one finds is in {self._folder.path}"
                )
                self._warn(self._failure)
                return
            except Exception as error:  # whatever it is: the search goes on, and hears of it
                self._failure = self._behind(in_words(error))
                self._warn(
                    f"cannot copy to {self._remote.uri} ({in_words(error)}); the search goes on, "
                    "and copying is tried again"
                )
                if closing:
                    time.sleep(COPY_EVERY)
                pause = min(2 * pause, PAUSE_AT_MOST)
                continue
            self._failure = None
            if closing:
                return
            took = time.monotonic() - began
            pause = min(max(COPY_EVERY, took * (1 / COPY_SHARE - 1)), PAUSE_AT_MOST)

    def _copy_changes(self, *, at_end: bool) -> None:
        self._claim.keep()
        present = self._present()
        changed = [
            name
            for name, version in present.items()
            if self._copied.get(name) != version and (at_end or not _is_database(name))
        ]
        if any(name.endswith(".state") for name in changed):
            # They may have grown since they were looked at, and must not stay behind the states.
            changed += [name for name in _LOGS if name in present and name not in changed]
        contents = self._read(sorted(changed, key=lambda name: _place(name, _READ_FIRST)))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for place in range(len(_WRITTEN_FIRST) + 1):
                names = [name for name in contents if _place(name, _WRITTEN_FIRST) == place]
                for name in pool.map(lambda name: self._write(name, contents[name]), names):
                    self._copied[name] = present[name]
        gone = self._copied.keys() - present.keys()
        # A file that is just being replaced may be missed once.
        for name in gone if at_end else gone & self._gone:
            self._remote.delete(name)
            del self._copied[name]
        self._gone = gone

    def _write(self, name: str, content: bytes) -> str:
        self._claim.keep()
        self._remote.write(name, content)
        self._steps += 1
        return name

    def _present(self) -> dict[str, _Version]:
        """Return the files of the folder that are copied, each as it is now."""
        found = {}
        for path in self._folder.path.rglob("*"):
            name = path.relative_to(self._folder.path)
            if any(part.startswith(".") for part in name.parts) or name.match("*.before.state"):
                continue
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    status = path.stat()
                    version = (status.st_ino, status.st_size, status.st_mtime_ns)
                    found[name.as_posix()] = version
        return found

    def _read(self, names: list[str]) -> dict[str, bytes]:
        contents = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                contents[name] = (self._folder.path / name).read_bytes()
        return contents

    def _behind(self, why: str) -> str:
        return (
            f"{self._remote.uri} is behind ({why}); nothing is lost: "
            f"--resume {self._folder.path} brings it up to date"
        )

    def _warn(self, text: str) -> None:
        """Say so once; what still holds at the end is said there, as the last word."""
        if not self._warned and not self._closing.is_set():
            self._warned = True
            tell(f"warning: {text}")


def _place(name: str, order: Sequence[str]) -> int:
    """Return a file's place in an order of patterns; the others come last."""
    path = PurePosixPath(name)
    return next((i for i, pattern in enumerate(order) if path.match(pattern)), len(order))


def _is_database(name: str) -> bool:
    """Say whether a file can be copied only once nobody writes to it; a resume makes it anew."""
    return PurePosixPath(name).match("study.db*")
