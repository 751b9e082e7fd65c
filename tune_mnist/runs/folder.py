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
from filelock import FileLock, Timeout

from tune_mnist.errors import RunFolderError, did_you_mean
from tune_mnist.runs.files import remove_leftovers, replace_file

_STARTING = 10.0  # seconds; a search writes search.yaml sooner than this after making its folder
# What PyYAML raises. The last line it does not wrap: a date such as 2024-99-99, `!!bool maybe`,
# endless nesting.
YAML_ERRORS = (
    yaml.YAMLError,
    *(ValueError, LookupError, AttributeError, TypeError, RecursionError),
)


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
            raise _cannot_write(path.parent, error) from error
        try:
            if not _is_abandoned(path):
                path.mkdir()
            (path / "checkpoints").mkdir(exist_ok=True)
        except FileExistsError:
            raise _exists(path) from None
        except OSError as error:
            raise _cannot_write(path, error) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing run's folder, or raise RunFolderError with what the path is instead."""
        folder = cls(path)
        try:
            if folder.search.is_file():
                return folder
        except OSError as error:  # a folder without permission
            raise RunFolderError(f"{path} cannot be read ({error.strerror})") from error
        if path.is_dir():
            what = "has no search.yaml"
        else:
            what = "is a file" if path.exists() else "does not exist"
        siblings = [found.parent.name for found in path.parent.glob("*/search.yaml")]
        raise RunFolderError(
            f"{path} is no run's folder: it {what}{did_you_mean(path.name, siblings)}"
        )

    def read_search(self) -> dict[str, Any]:
        """Read search.yaml, or raise RunFolderError if it is damaged."""
        try:
            data = yaml.safe_load(self.search.read_text(encoding="utf-8"))
        except (OSError, *YAML_ERRORS) as error:
            raise RunFolderError(
                f"{self.search} cannot be read: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(data, dict):
            raise RunFolderError(
                f"{self.search} is damaged: a mapping was expected; put back a copy"
            )
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
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunFolderError(
                f"{self.path} is in use: another search is writing to it; wait for it or stop it"
            ) from None
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        try:
            remove_leftovers(self.path)
            remove_leftovers(self.checkpoints)
            yield
        finally:
            lock.release()


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
        raise _cannot_write(path.parent, error) from error


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


def _cannot_write(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"cannot write to {path} ({error.strerror}): choose a folder with --results-dir"
    )
