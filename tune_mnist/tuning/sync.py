"""A run's copy elsewhere, from which a search is resumed when its driver's machine is lost.

The driver works on the run's folder. As a session begins, folder and copy are compared, and what
only the copy has is fetched; once the search is sure to run, a background thread copies what
changes.

At every instant the copy is a run that can be resumed. Each round reads the states before the
events, these before the epochs and the best model last, each as it is by then, and writes them in
the opposite order: the copied epochs are never older than the events or the states, nor the best
model than the epochs. A fetch drops what is newer than the rest, or the search runs it again.

Whatever happens to the folder, the copy keeps what it has. Its logs are only ever extended, and
the only files deleted there are states of trials that have ended by its own events. Copying stops
if the folder is moved away, or its logs do not continue the copied ones.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from tune_mnist.cli import tell
from tune_mnist.errors import RunFolderError, TuneMnistError, one_line
from tune_mnist.locations import check_run_name, identity, remember_storage
from tune_mnist.runs.checkpoints import is_whole, is_whole_model
from tune_mnist.runs.files import open_plain, replace_file
from tune_mnist.runs.folder import RunFolder, cannot_write
from tune_mnist.runs.formatting import short_path
from tune_mnist.runs.history import History
from tune_mnist.tuning.background import BackgroundThread, Pace
from tune_mnist.tuning.plan import Plan
from tune_mnist.tuning.remote import Lease, RemoteRun, StoppedError, reaching
from tune_mnist.tuning.runner import writing

COPY_EVERY = 2.0  # seconds between two rounds
COPY_LOAD = 0.2  # of the time, at most, once there is much to copy
PAUSE_AT_MOST = 15.0  # seconds: every round gives a sign of life
CLOSING_PATIENCE = 20.0  # seconds without progress to wait at the end
AT_ONCE = 8  # files under way to the storage: each waits for an answer for most of its time

_READ_FIRST = ("*.state", "events.jsonl", "epochs.csv")
_WRITTEN_FIRST = ("search.yaml", "best.pt", "epochs.csv", "events.jsonl", "*.state")
_LOGS = ("events.jsonl", "epochs.csv")
_RUNS = ("", "confirm/")  # in a run's folder

Version = tuple[int, int, int]


@contextlib.contextmanager
def copied(folder: RunFolder, remote: RemoteRun) -> Iterator["RunSync"]:
    """Hold the right to write to a run's copy, and fetch what only the copy has.

    Nothing is copied there before `begin`. Only for the one process that writes to the folder.
    Raises RunFolderError if the copy cannot be reached, is in use or is another run's.
    """
    with writing(folder):
        lease = Lease(remote, folder.path)
    lease.take()
    with contextlib.closing(RunSync(folder, remote, lease)) as sync:
        fetch_newer(folder, remote)
        yield sync


class RunSync:
    """Copies a run's folder in the background, for as long as a driver works on it."""

    def __init__(self, folder: RunFolder, remote: RemoteRun, lease: "Lease") -> None:
        self._folder, self._remote, self._lease = folder, remote, lease
        self._opened = identity(folder.path)
        self._logs: dict[str, bytes] = {}  # as they are in the copy
        self._copied: dict[str, Version | None] = {}  # what else is there, in which version
        self._begun = False
        self._was_away = False  # the storage: what is in the copy now may be anything
        self._stopped = ""  # why nothing more is copied
        self._quiet = False
        pace = Pace(COPY_EVERY, COPY_EVERY, PAUSE_AT_MOST, CLOSING_PATIENCE, load=COPY_LOAD)
        self._thread = BackgroundThread("storage", pace, self._work, self._failed)
        self._thread.start()

    def begin(self) -> None:
        """Copy the folder from here on, or raise RunFolderError if the copy cannot be reached."""
        with reaching(self._remote):
            self._look()
        remember_storage(self._remote.storage)
        tell(f"{short_path(self._folder.path)} is copied to {self._remote.uri} as it grows")
        self._begun = True

    def close(self) -> None:
        """Copy what is left, or warn that it could not be copied."""
        self._quiet = True  # what still holds is said here
        failure = self._thread.close()
        if self._stopped:
            tell(f"warning: {self._stopped}")
        elif failure and self._begun:
            tell(
                f"warning: {self._remote.uri} is behind ({failure}); nothing is lost: "
                f"--resume {self._folder.path} brings it up to date"
            )

    def _work(self, closing: bool) -> None:
        if self._stopped:
            return
        try:
            self._keep_lease()
            if self._begun:
                if self._was_away:
                    self._look_again()
                self._copy_changes(at_end=closing)
        except StoppedError as error:
            self._stopped = str(error)
            self._warn_once(self._stopped)
        if closing or self._stopped:
            self._lease.release()

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

    def _look(self) -> None:
        """See what is in the copy."""
        self._logs = _logs(self._remote.read)
        self._copied = dict.fromkeys(self._remote.names())
        self._was_away = False

    def _look_again(self) -> None:
        """See what is left; raise StoppedError if there is more than this driver wrote."""
        before = self._logs
        self._look()
        if not _continues(before, self._logs):
            raise self._lease.taken_over()

    def _keep_lease(self) -> None:
        self._was_away |= not self._lease.keep()

    def _copy_changes(self, *, at_end: bool) -> None:
        versions, contents = self._read_changes(at_end)
        put_aside = self._check(contents)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for place in range(len(_WRITTEN_FIRST) + 1):
                names = [name for name in contents if _place(name, _WRITTEN_FIRST) == place]
                for name in pool.map(lambda name: self._write(name, contents[name]), names):
                    self._copied[name] = versions[name]
                    if name in self._logs:
                        self._logs[name] = contents[name]
        self._logs |= dict.fromkeys(put_aside, b"")
        self._delete_states_of_ended()

    def _read_changes(self, at_end: bool) -> tuple[dict[str, Version], dict[str, bytes]]:
        """Return what has changed of the folder, each file as it is when its turn comes."""
        # These may come into being after the others were listed.
        names = {f"{run}{name}" for run in _RUNS for name in (*_LOGS, "best.pt")}
        names |= {path.relative_to(self._folder.path).as_posix() for path in _files(self._folder)}
        versions, contents = {}, {}
        for name in sorted(names, key=lambda name: _place(name, _READ_FIRST)):
            path = self._folder.path / name
            # study.db is whole only once nobody writes to it; a resume rewrites it.
            if (path.match("study.db*") and not at_end) or not _is_plain(path):
                continue
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                version = _version(path)
                if version == self._copied.get(name):
                    continue
                content = _content(path)
                if path.name in _LOGS:
                    content = _finished(content)
                if _is_sound(self._folder, name, content):
                    versions[name], contents[name] = version, content
        return versions, contents

    def _check(self, contents: dict[str, bytes]) -> set[str]:
        """Raise StoppedError if the folder is not the one that was opened, or was damaged.

        A confirmation that was put aside is copied under its new name before another takes its
        place; return the names of its logs.
        """
        if identity(self._folder.path) != self._opened:
            raise StoppedError(
                f"{self._folder.path} is no longer the folder that was opened: it was moved or "
                f"removed, or its disk is away; {self._remote.uri} stays as it is"
            )
        put_aside = set()
        for name, there in self._logs.items():
            path = self._folder.path / name
            here = contents.get(name, there if path.exists() else b"")  # unless it has not changed
            if here.startswith(there):
                continue
            if not _is_aside(self._folder, name, there):
                raise StoppedError(
                    f"{path} does not continue its copy: it was damaged or replaced; "
                    f"{self._remote.uri} stays as it is"
                )
            put_aside.add(name)
        for name in [name for name in contents if put_aside and name.startswith(_RUNS[1])]:
            del contents[name]
        return put_aside

    def _write(self, name: str, content: bytes) -> str:
        self._keep_lease()
        if self._was_away:
            raise OSError("it was away for a while")
        self._remote.write(name, content)
        self._thread.made_progress()
        return name

    def _delete_states_of_ended(self) -> None:
        for name in [name for name in self._copied if name.endswith(".state")]:
            if not (self._folder.path / name).exists() and _has_ended(name, self._logs):
                self._remote.delete(name)
                del self._copied[name]


def _files(folder: RunFolder) -> Iterator[Path]:
    """Yield the plain files of a folder that are copied, whatever vanishes meanwhile."""
    for inner, folders, names in os.walk(folder.path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(inner, name) for name in names if not name.startswith(".")):
            if _is_plain(path) and not path.match("*.before.state"):
                yield path


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _version(path: Path) -> Version:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _content(path: Path) -> bytes:
    with os.fdopen(open_plain(path), "rb") as file:
        return file.read()


def _is_sound(folder: RunFolder, name: str, content: bytes) -> bool:
    """Return False if a file is damaged, as after a power cut: the copy's may be whole."""
    if name == "search.yaml":
        with contextlib.suppress(TuneMnistError):
            return bool(Plan.load(folder))
        return False
    if name.endswith(".state"):
        return is_whole(content)
    if name.endswith("best.pt"):
        return is_whole_model(content)
    return bool(content) or name.endswith(_LOGS)


def _finished(log: bytes) -> bytes:
    """Return the whole lines of a log."""
    return log[: log.rfind(b"\n") + 1]


def _has_ended(name: str, logs: Mapping[str, bytes]) -> bool:
    """Return True if a file is the state of a trial that has ended, as the logs of its run say."""
    path = PurePosixPath(name)
    events = logs.get(f"{path.parent.parent}/events.jsonl".removeprefix("./"), b"")
    ends = (line for line in events.splitlines() if line.startswith(b'{"event": "end"'))
    return path.match("checkpoints/*.state") and path.name.partition(".")[0] in {
        f"{json.loads(line)['trial']:05d}" for line in ends
    }


def _is_aside(folder: RunFolder, name: str, log: bytes) -> bool:
    """Return True if a confirmation's log lies in the folder under another name."""
    run, _, file = name.rpartition("/")
    others = folder.path.glob(f"*/{file}") if run and log else ()
    return any(path.parent.name != run and _content(path).startswith(log) for path in others)


def _place(name: str, order: Sequence[str]) -> int:
    """Return a file's place in an order of patterns; files that match none come last."""
    path = PurePosixPath(name)
    return next((i for i, pattern in enumerate(order) if path.match(pattern)), len(order))


def check_new_copy(remote: RemoteRun) -> None:
    """Raise RunFolderError, before anything starts, if a copy exists or cannot be written."""
    with reaching(remote):
        remote.make()
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
    check_run_name(remote.name, "the last part of --resume")
    path = results / remote.name
    remote.check_is_apart(path)
    with reaching(remote):
        if not remote.read("search.yaml"):
            raise RunFolderError(f"{remote.uri} is no run's copy: it has no search.yaml")
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    return RunFolder(path)


def fetch_newer(folder: RunFolder, remote: RemoteRun) -> None:
    """Fetch the copy if it is ahead of the folder, as after a resume on another machine.

    If it is not, fetch the files that only the copy has. What is fetched is read before anything
    is replaced. Raises RunFolderError if the copy cannot be reached, is damaged, or another run's.
    """
    with reaching(remote):
        theirs, names = _logs(remote.read), remote.names()
    ours = _logs(RemoteRun(folder.path.absolute().as_uri()).read)
    if any(_is_aside(folder, name, log) for name, log in theirs.items()):
        names = [name for name in names if not name.startswith(_RUNS[1])]
        theirs |= dict.fromkeys([name for name in theirs if name.startswith(_RUNS[1])], b"")
    is_ahead = not _continues(ours, theirs)
    if is_ahead and not _continues(theirs, ours):
        raise RunFolderError(
            f"{folder.path} and {remote.uri} are two runs, or one that was resumed in both "
            "places: choose another --storage, or move the folder away to resume the copy"
        )
    wanted = [
        name
        for name in names
        if is_ahead or not ((folder.path / name).exists() or _has_ended(name, ours))
    ]
    if not wanted:
        return
    tell(f"fetching {remote.uri}")
    with reaching(remote):
        contents = {name: remote.read(name) for name in wanted}
    contents |= {name: log for name, log in theirs.items() if name in contents}
    with writing(folder), _staged(folder, contents) as staged:
        if is_ahead:
            _check(staged, remote)
        # The logs last: a kill in between leaves a folder that is still behind.
        for name in sorted(contents, key=theirs.__contains__):
            path = folder.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            (staged.path / name).replace(path)


@contextlib.contextmanager
def _staged(folder: RunFolder, contents: Mapping[str, bytes]) -> Iterator[RunFolder]:
    """Provide a run's files in a folder within its own, from where they can be moved."""
    staged = folder.path / ".fetched"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        for name, content in contents.items():
            path = staged / name
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content)
        yield RunFolder(staged)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _check(staged: RunFolder, remote: RemoteRun) -> None:
    """Raise RunFolderError if a run that was fetched cannot be resumed."""
    try:
        Plan.load(staged)
        for run in _RUNS:
            History.load(RunFolder(staged.path / run))
    except TuneMnistError as error:
        raise RunFolderError(
            f"nothing was fetched: {str(error).replace(str(staged.path), remote.uri)}"
        ) from error


def _logs(read: Callable[[str], bytes]) -> dict[str, bytes]:
    """Return the events and epochs of a run and of its confirmation, as far as they agree.

    Epochs that are newer than the events may be of trials that these do not have.
    """
    found: dict[str, bytes] = {}
    for run in _RUNS:
        names = [f"{run}{log}" for log in _LOGS]
        events, epochs = (_finished(content) for content in map(read, names))
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
