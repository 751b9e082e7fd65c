"""A run's copy elsewhere, from which a search is resumed when its driver's machine is lost.

The driver works on the run's folder. As a session begins, folder and copy are compared, and the
one that is behind is brought up to date; from then on a background thread copies what changes.

At every instant the copy is a run that can be resumed. Each round reads the states before the
events and these before the epochs, and writes them in the opposite order: the copied epochs are
never older than the events or the states, nor the best model than the epochs. A fetch drops what
is newer than the rest, or the search runs it again.
"""

import contextlib
import json
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from tune_mnist.cli import tell
from tune_mnist.errors import RunFolderError, one_line
from tune_mnist.runs.files import replace_file
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.formatting import short_path
from tune_mnist.tuning.background import BackgroundThread, Pace
from tune_mnist.tuning.remote import RemoteRun, reaching
from tune_mnist.tuning.runner import writing

COPY_EVERY = 2.0  # seconds between two rounds
COPY_LOAD = 0.2  # of the time, at most, once there is much to copy
PAUSE_AT_MOST = 15.0  # seconds: every round gives a sign of life
CLOSING_PATIENCE = 20.0  # seconds without progress to wait at the end
AT_ONCE = 8  # files under way to the storage: each waits for an answer for most of its time

_READ_FIRST = ("*.state", "events.jsonl", "epochs.csv", "best.pt")
_WRITTEN_FIRST = ("search.yaml", "best.pt", "epochs.csv", "events.jsonl", "*.state")
_LOGS = ("events.jsonl", "epochs.csv")


@contextlib.contextmanager
def kept_in_line(folder: RunFolder, remote: RemoteRun) -> Iterator[None]:
    """Bring folder or copy up to date, whichever is behind, then copy all changes of the folder.

    Only for the one process that writes to the folder. Raises RunFolderError if the copy cannot
    be reached, is in use or is another run's.
    """
    lease = Lease(remote, folder.path)
    lease.take()
    fetch_newer(folder, remote)
    with reaching(remote):
        sync = RunSync(folder, remote, lease)
    tell(f"{short_path(folder.path)} is copied to {remote.uri} as it grows")
    with contextlib.closing(sync):
        yield


class RunSync:
    """Copies a run's folder in the background, for as long as a driver works on it."""

    def __init__(self, folder: RunFolder, remote: RemoteRun, lease: "Lease") -> None:
        self._folder, self._remote, self._lease = folder, remote, lease
        self._copied: dict[str, tuple[int, ...] | None] = dict.fromkeys(remote.names())
        self._gone: set[str] = set()  # copied, and missing in the folder when last looked at
        self._taken_over = ""  # what to say of it
        self._quiet = False
        pace = Pace(COPY_EVERY, COPY_EVERY, PAUSE_AT_MOST, CLOSING_PATIENCE, load=COPY_LOAD)
        self._thread = BackgroundThread("storage", pace, self._work, self._failed)
        self._thread.start()

    def close(self) -> None:
        """Copy what is left, or warn that it could not be copied."""
        self._quiet = True  # what still holds is said here
        failure = self._thread.close()
        if self._taken_over:
            tell(f"warning: {self._taken_over}")
        elif failure:
            tell(
                f"warning: {self._remote.uri} is behind ({failure}); nothing is lost: "
                f"--resume {self._folder.path} brings it up to date"
            )

    def _work(self, closing: bool) -> None:
        if self._taken_over:
            return
        try:
            self._copy_changes(at_end=closing)
            if closing:
                self._lease.release()
        except TakenOverError:
            self._taken_over = (
                f"{self._remote.uri} is left to another driver, which took this one for dead; "
                f"what this one finds is in {self._folder.path}"
            )
            self._warn_once(self._taken_over)

    def _failed(self, error: Exception) -> str:
        reason = one_line(error)
        self._warn_once(
            f"cannot copy to {self._remote.uri} ({reason}); the search continues, "
            "and copying is tried again"
        )
        return reason

    def _warn_once(self, text: str) -> None:
        if not self._quiet:
            self._quiet = True
            tell(f"warning: {text}")

    def _copy_changes(self, *, at_end: bool) -> None:
        self._lease.keep()
        present = self._present()
        changed = [
            name
            for name, version in present.items()
            if self._copied.get(name) != version
            # study.db is whole only once nobody writes to it; a resume rewrites it.
            and (at_end or not PurePosixPath(name).match("study.db*"))
        ]
        if any(name.endswith(".state") for name in changed):
            # They may have grown since they were looked at, and must not be behind the states.
            changed += [name for name in _LOGS if name in present and name not in changed]
        contents = {}
        for name in sorted(changed, key=lambda name: _place(name, _READ_FIRST)):
            with contextlib.suppress(FileNotFoundError):
                contents[name] = (self._folder.path / name).read_bytes()
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
        self._lease.keep()
        self._remote.write(name, content)
        self._thread.made_progress()
        return name

    def _present(self) -> dict[str, tuple[int, ...]]:
        """Return the files of the folder that are copied, with their present versions."""
        found: dict[str, tuple[int, ...]] = {}
        for path in self._folder.path.rglob("*"):
            name = path.relative_to(self._folder.path)
            if any(part.startswith(".") for part in name.parts) or name.match("*.before.state"):
                continue
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    status = path.stat()
                    found[name.as_posix()] = status.st_ino, status.st_size, status.st_mtime_ns
        return found


def _place(name: str, order: Sequence[str]) -> int:
    """Return a file's place in an order of patterns; files that match none come last."""
    path = PurePosixPath(name)
    return next((i for i, pattern in enumerate(order) if path.match(pattern)), len(order))


LEASE = 60.0  # seconds without a sign of life after which a driver is taken for dead
SIGN_EVERY = 15.0  # seconds between two signs of life
LOOK_EVERY = 1.0  # seconds between two looks at whether another driver gives one
_DRIVER = ".driver"


class TakenOverError(Exception):
    """Another driver took this one for dead and writes to the copy."""


class Lease:
    """The right of one driver to write to a run's copy, as long as it gives signs of life.

    A bucket knows no lock that ends with a process. So a driver keeps a file there that names it,
    and rewrites it every `SIGN_EVERY` seconds. One that has not for `LEASE` seconds is taken for
    dead; if it lives after all, it sees that it was taken over and no longer writes there.

    Two things are not ruled out. If two drivers begin within the same fraction of a second, the
    first to give its next sign of life leaves the copy to the other. And files that were under
    way when a machine was suspended arrive when it wakes up.
    """

    def __init__(self, remote: RemoteRun, folder: Path) -> None:
        self._remote = remote
        self._me = {
            "host": platform.node(),
            "folder": str(folder.resolve()),
            "lease": uuid.uuid4().hex,
        }
        self._next_sign = 0.0

    def take(self) -> None:
        """Become the only writer once another's lease has run out, or raise RunFolderError.

        Only for the one process that writes to the local folder: a lease that was taken for the
        same folder is a dead driver's.
        """
        with reaching(self._remote):
            self._wait_for_other()
            self._sign()

    def keep(self) -> None:
        """Give a sign of life, if it is time to; raise TakenOverError if another took over."""
        if time.time() >= self._next_sign:  # a clock that runs on while a machine is suspended
            if self._driver() != self._me:  # or there is none: the other driver may have ended
                raise TakenOverError
            self._sign()

    def release(self) -> None:
        """Let other drivers write there at once."""
        if self._driver() == self._me:
            self._remote.delete(_DRIVER)

    def _wait_for_other(self) -> None:
        now, last, other = self._remote.now(), self._remote.time_of(_DRIVER), self._driver()
        if last is None or other == self._me | {"lease": other.get("lease")}:
            return
        left = LEASE - (now - last).total_seconds()
        if left <= 0:
            return
        host = other.get("host", "another machine")
        tell(f"{self._remote.uri}: seeing for {left:.0f} s whether its driver on {host} is alive")
        deadline = time.monotonic() + left
        while time.monotonic() < deadline:
            time.sleep(LOOK_EVERY)
            sign = self._remote.time_of(_DRIVER)
            if sign is None:
                return
            if sign != last:
                raise RunFolderError(
                    f"{self._remote.uri} is in use: a search on {host} is writing to it; wait "
                    "for it or stop it"
                )

    def _sign(self) -> None:
        self._remote.write(_DRIVER, json.dumps(self._me).encode())
        self._next_sign = time.time() + SIGN_EVERY

    def _driver(self) -> dict[str, Any]:
        return dict(json.loads(self._remote.read(_DRIVER) or b"{}"))


def check_new_copy(remote: RemoteRun) -> None:
    """Raise RunFolderError, before anything starts, if a copy exists or cannot be written."""
    with reaching(remote):
        remote.now()
        if remote.read("search.yaml"):
            raise RunFolderError(
                f"the run {remote.uri} exists and is never overwritten: "
                f"choose another name with --run, or resume it: --resume '{remote.uri}'"
            )


def folder_for(remote: RemoteRun, results: Path) -> RunFolder:
    """Make the local folder in which a copy is resumed.

    Raises RunFolderError if there is no such copy, or if the folder cannot be written.
    """
    with reaching(remote):
        if not remote.read("search.yaml"):
            raise RunFolderError(f"{remote.uri} is no run's copy: it has no search.yaml")
    path = results / remote.name
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"cannot write to {path} ({error.strerror}): choose a folder with --results-dir"
        ) from error
    return RunFolder(path)


def fetch_newer(folder: RunFolder, remote: RemoteRun) -> None:
    """Fetch the copy if it is ahead of the folder, as after a resume on another machine.

    Raises RunFolderError if the copy cannot be reached, or is another run's.
    """
    with reaching(remote):
        theirs = _logs(remote.read)
    ours = _logs(RemoteRun(folder.path.absolute().as_uri()).read)
    if _continues(ours, theirs):
        return
    if not _continues(theirs, ours):
        raise RunFolderError(
            f"{folder.path} and {remote.uri} are two runs, or one that was resumed in both "
            "places: choose another --storage, or move the folder away to resume the copy"
        )
    tell(f"fetching {remote.uri}")
    with reaching(remote):
        contents = {name: remote.read(name) for name in remote.names()}
    contents |= {name: log for name, log in theirs.items() if name in contents}
    with writing(folder):
        # The logs last: a kill in between leaves a folder that is still behind.
        for name in sorted(contents, key=theirs.__contains__):
            path = folder.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, contents[name])


def _logs(read: Callable[[str], bytes]) -> dict[str, bytes]:
    """Return the events and epochs of a run and of its confirmation, as far as they agree.

    Epochs that are newer than the events may be of trials that these do not have.
    """
    found: dict[str, bytes] = {}
    for run in ("", "confirm/"):
        names = [f"{run}{log}" for log in _LOGS]
        events, epochs = (content[: content.rfind(b"\n") + 1] for content in map(read, names))
        started = sum(line.startswith(b'{"event": "start"') for line in events.splitlines())
        found |= zip(names, (events, b"".join(_rows_of(started, epochs))), strict=True)
    return found


def _rows_of(trials: int, epochs: bytes) -> Iterator[bytes]:
    """Yield the lines of epochs.csv up to the first one of a trial beyond the first `trials`."""
    for line in epochs.splitlines(keepends=True):
        number, _, _ = line.partition(b",")
        if number.isdigit() and int(number) >= trials:
            return
        yield line


def _continues(logs: Mapping[str, bytes], others: Mapping[str, bytes]) -> bool:
    return all(log.startswith(others[name]) for name, log in logs.items())
