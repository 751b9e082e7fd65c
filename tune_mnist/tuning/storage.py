"""A run's copy elsewhere, so that a search whose driver's machine is lost is gone on with there.

The run's folder stays what the driver works on; it and its copy are compared as a session begins,
and the one that is behind is caught up.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tune_mnist.analysis.files import replace_file
from tune_mnist.analysis.run import RunFolder
from tune_mnist.analysis.wording import short_path
from tune_mnist.cli import tell
from tune_mnist.errors import RunFolderError
from tune_mnist.tuning.claim import Claim
from tune_mnist.tuning.copying import Copying
from tune_mnist.tuning.remote import RemoteRun, reaching
from tune_mnist.tuning.runner import writing


@contextlib.contextmanager
def kept_in_line(folder: RunFolder, remote: RemoteRun) -> Iterator[None]:
    """Keep a run's copy in line with its folder, after the one that is behind was caught up.

    Only for who alone writes to the folder.

    Raises:
        RunFolderError: the copy cannot be reached, is in use or is another run's.
    """
    claim = Claim(remote, folder.path)
    claim.take(tell)
    fetch_newer(folder, remote)
    with reaching(remote):
        copying = Copying(folder, remote, claim)
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
