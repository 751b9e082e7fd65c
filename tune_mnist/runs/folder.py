"""A run's folder: where each of its files lies, and who may write there."""

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import yaml

from tune_mnist.errors import RunFolderError, did_you_mean, shown
from tune_mnist.runs.files import (
    hold_lock,
    in_use,
    is_locked,
    open_plain,
    read_yaml,
    remove_leftovers,
    replace_file,
)

_STARTING = 10.0  # seconds; a search writes search.yaml sooner than this after making its folder
_LONGEST_REASON = 1000  # characters


class RunFolder:
    """The paths of one run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.search = path / "search.yaml"  # what was asked: settings, space, versions, machine
        self.events = path / "events.jsonl"  # what happened to trials and sessions
        self.epochs = path / "epochs.csv"  # a row per trial and epoch
        self.trials = path / "trials.csv"  # a row per trial
        self.best = path / "best.csv"  # the best configurations
        self.confirmed = path / "confirmed.csv"  # these on fresh seeds
        self.best_model = path / "best.pt"  # weights and configuration, for weights-only loading
        self.study = path / "study.db"  # the Optuna study, SQLite
        self.checkpoints = path / "checkpoints"  # the last states of unfinished trials
        self.tensorboard = path / "tensorboard"  # curves, a folder per trial
        self._lock = path / ".lock"

    @property
    def confirmation(self) -> "RunFolder":
        """The run that confirmed.csv comes from."""
        return RunFolder(self.path / "confirm")

    @property
    def name(self) -> str:
        return self.path.resolve().name  # resolved for `--resume .`

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make a new run's folder, or raise RunFolderError if it exists or cannot be made.

        One whose search was killed before it started is used again.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path.parent, error) from error
        try:
            if not _is_abandoned(path):
                path.mkdir()
            (path / "checkpoints").mkdir(exist_ok=True)
        except FileExistsError:
            raise _exists(path) from None
        except OSError as error:
            raise cannot_write(path, error) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing run's folder, or raise RunFolderError with what the path is instead."""
        folder = cls(path)
        if os.path.lexists(folder.search):
            folder.check_plain()
            return folder
        try:
            next(path.iterdir(), None)
            what = "has no search.yaml"
        except FileNotFoundError:
            what = "does not exist"
        except NotADirectoryError:
            what = "is a file"
        except OSError as error:  # a folder without permission, a name too long
            raise RunFolderError(f"{path} cannot be read ({error.strerror})") from error
        siblings = [found.parent.name for found in path.parent.glob("*/search.yaml")]
        raise RunFolderError(
            f"{path} is no run's folder: it {what}{did_you_mean(path.name, siblings)}"
        )

    def check_plain(self) -> None:
        """Raise RunFolderError if the folder holds a link, a pipe or a device, at any depth.

        A run may come from anywhere: what is written in its folder must not land elsewhere.
        """
        try:
            found = next(_files_of_other_kinds(self.path), None)
        except OSError as error:  # a folder without permission
            raise RunFolderError(f"{self.path} cannot be read ({error.strerror})") from error
        if found is not None:
            raise RunFolderError(
                f"{self.path} holds {shown(os.path.relpath(found, self.path))}, which is neither "
                "a plain file nor a folder: remove it, or put the file itself there"
            )

    @property
    def is_at_work(self) -> bool:
        """Whether a process holds the right to write to the run; False also if unknown."""
        return is_locked(self._lock) or is_locked(self.events)

    def read_search(self) -> dict[str, Any]:
        """Read search.yaml, or raise RunFolderError if it is damaged."""
        try:
            data = read_yaml(self.search)
            if not isinstance(data, dict):
                raise ValueError("a mapping was expected")
        except OSError as error:
            raise RunFolderError(f"{self.search} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise damaged(self.search, error) from error
        return data

    def write_search(self, data: dict[str, Any]) -> None:
        """Write search.yaml; an OSError leaves the old file untouched."""
        replace_file(self.search, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[None]:
        """Hold the right to write to the run, or raise RunFolderError if another process does.

        The operating system's lock counts, not whether its file exists: a killed process holds
        none.
        """
        self.check_plain()
        try:
            lock = open_plain(self._lock, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            hold_lock(lock, self.path)
            self._make_ready()
            yield
        finally:
            os.close(lock)

    def _make_ready(self) -> None:
        """See that no writer is left whose lock was deleted, and clear up after a killed one."""
        if is_locked(self.events):
            raise in_use(self.path)
        try:
            self.checkpoints.mkdir(exist_ok=True)  # Git, zip and buckets drop it where empty
        except OSError as error:
            raise cannot_write(self.path, error) from error
        remove_leftovers(self.path)
        remove_leftovers(self.checkpoints)


def _files_of_other_kinds(folder: Path) -> Iterator[str]:
    """Yield what is neither a plain file nor a folder, without following links."""
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                    yield entry.path  # unless it was replaced just now


def damaged(path: Path, error: Exception, where: str = "", way_out: str = "") -> RunFolderError:
    """Return the error for a file of a run that does not hold what it must."""
    what = " ".join(str(error).split())[:_LONGEST_REASON]
    return RunFolderError(f"{path} is damaged{where} ({what}): put back a copy{way_out}")


def check_new_run(path: Path) -> None:
    """Raise now the RunFolderError that `RunFolder.create` would raise later."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
            if not _is_abandoned(path):
                raise _exists(path)
        parent = path.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
        # Only trying finds a read-only disk; the permissions do not show it.
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise cannot_write(path.parent, error) from error


def _is_abandoned(path: Path) -> bool:
    """Return True if a search was killed just after making this folder: nothing can be resumed.

    A young folder may belong to a search that is about to start. If two searches reuse an old one
    at once, `only_writer` decides between them.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    if time.time() - path.stat().st_mtime < _STARTING:
        return False
    others = {found.name for found in path.iterdir() if not found.match(".search.yaml.*.tmp")}
    made_first = {".lock", ".folder", "checkpoints"}
    return others <= made_first and not any((path / "checkpoints").glob("*"))


def _exists(path: Path) -> RunFolderError:
    return RunFolderError(
        f"the run {path} exists and is never overwritten: "
        f"choose another name with --run, or resume it: --resume {path}"
    )


def cannot_write(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"cannot write to {path} ({error.strerror}): choose a folder with --results-dir"
    )
