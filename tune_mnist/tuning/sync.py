"""RunSync a run's folder as it grows, in a thread: a slow or absent storage holds up nothing.

Whatever instant the machine is lost at, the copy is a run that can be gone on with. Each round
reads the states before the events and these before the epochs, and writes them the other way
round: the copied epochs are never older than the events or the states, nor the best model than the
epochs. What is newer than the rest is dropped when the copy is fetched, or run again.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from tune_mnist.cli import tell
from tune_mnist.errors import RunFolderError
from tune_mnist.runs.files import replace_file
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.formatting import short_path
from tune_mnist.tuning.remote import Lease, RemoteRun, TakenOverError, in_words, reaching
from tune_mnist.tuning.runner import writing

COPY_EVERY = 2.0  # seconds between two rounds
COPY_SHARE = 0.2  # of the time, at most, once there is much to copy
PAUSE_AT_MOST = 15.0  # seconds: every round gives a sign of life
CLOSING_PATIENCE = 20.0  # seconds without progress to wait at the end
AT_ONCE = 8  # files under way to the storage: each waits for an answer for most of its time

_READ_FIRST = ("*.state", "events.jsonl", "epochs.csv", "best.pt")
_LOGS = ("events.jsonl", "epochs.csv")
_WRITTEN_FIRST = ("search.yaml", "best.pt", "epochs.csv", "events.jsonl", "*.state")
_Version = tuple[int, int, int]


class RunSync:
    """Copies a run's folder, in a thread, for as long as a driver works on it."""

    def __init__(self, folder: RunFolder, remote: RemoteRun, claim: Lease) -> None:
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


# MERGED-DOC tuning.storage: A run's copy elsewhere, so that a search whose driver's machine is
# lost is gone on with there. The run's folder stays what the driver works on; it and its copy are
# compared as a session begins, and the one that is behind is caught up.


@contextlib.contextmanager
def kept_in_line(folder: RunFolder, remote: RemoteRun) -> Iterator[None]:
    """Keep a run's copy in line with its folder, after the one that is behind was caught up.

    Only for who alone writes to the folder.

    Raises:
        RunFolderError: the copy cannot be reached, is in use or is another run's.
    """
    claim = Lease(remote, folder.path)
    claim.take(tell)
    fetch_newer(folder, remote)
    with reaching(remote):
        copying = RunSync(folder, remote, claim)
    tell(f"{short_path(folder.path)} is copied to {remote.uri} as it grows")
    try:
        yield
    finally:
        if failure := copying.close():
            tell(f"warning: {failure}")


def check_new_copy(remote: RemoteRun) -> None:
    """Refuse early, before anything is started, a copy that exists or cannot be made.

    Raises:
        RunFolderError: it is so.
    """
    with reaching(remote):
        remote.now()
        exists = bool(remote.read("search.yaml"))
    if exists:
        raise RunFolderError(
            f"the run {remote.uri} exists and is never overwritten: "
            f"choose another name with --run, or go on with it: --resume '{remote.uri}'"
        )


def folder_for(remote: RemoteRun, results: Path) -> RunFolder:
    """Make the folder in which a run is gone on with that may be known by its copy only.

    Raises:
        RunFolderError: there is no such run, or no room for it.
    """
    with reaching(remote):
        exists = bool(remote.read("search.yaml"))
    if not exists:
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
    """Fetch a copy that is further along than the folder, as when another machine went on.

    Raises:
        RunFolderError: the copy cannot be reached, or is another run's.
    """
    with reaching(remote):
        theirs = _logs(remote.read)
    ours = _logs(lambda name: _content(folder.path / name))
    if _continues(ours, theirs):
        return
    if not _continues(theirs, ours):
        raise RunFolderError(
            f"{folder.path} and {remote.uri} are two runs, or one that was gone on with in both "
            "places: choose another --storage, or move the folder away to go on with the copy"
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

    Epochs that are newer than the events may be of trials of which these do not tell.
    """
    found: dict[str, bytes] = {}
    for run in ("", "confirm/"):
        events, epochs = (
            content[: content.rfind(b"\n") + 1]
            for content in (read(f"{run}events.jsonl"), read(f"{run}epochs.csv"))
        )
        started = sum(line.startswith(b'{"event": "start"') for line in events.splitlines())
        found[f"{run}events.jsonl"] = events
        found[f"{run}epochs.csv"] = b"".join(_rows_of(started, epochs))
    return found


def _rows_of(trials: int, epochs: bytes) -> Iterator[bytes]:
    """Return the lines of epochs.csv before the first of a trial beyond so many."""
    for line in epochs.splitlines(keepends=True):
        number, _, _ = line.partition(b",")
        if number.isdigit() and int(number) >= trials:
            return
        yield line


def _continues(logs: Mapping[str, bytes], others: Mapping[str, bytes]) -> bool:
    return all(log.startswith(others[name]) for name, log in logs.items())


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
