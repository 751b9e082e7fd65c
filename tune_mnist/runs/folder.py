"""A run's folder: where each of its files lies, and who may write there."""

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from filelock import FileLock, Timeout

from tune_mnist.errors import RunFolderError, did_you_mean
from tune_mnist.runs.files import remove_leftovers, replace_file

_BEGINNING = 10.0  # seconds: more than a search takes from its folder to its search.yaml


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run's files."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return self.path.resolve().name  # `--resume .` has one as well

    @property
    def search(self) -> Path:
        """What was asked, resolved: settings, space, versions, machine."""
        return self.path / "search.yaml"

    @property
    def events(self) -> Path:
        """What happened to trials and sessions, a JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def epochs(self) -> Path:
        """One row per trial and epoch."""
        return self.path / "epochs.csv"

    @property
    def trials(self) -> Path:
        """One row per trial."""
        return self.path / "trials.csv"

    @property
    def best(self) -> Path:
        """The best configurations."""
        return self.path / "best.csv"

    @property
    def best_model(self) -> Path:
        """The best trial's weights with its configuration, for torch's weights-only loader."""
        return self.path / "best.pt"

    @property
    def study(self) -> Path:
        """The Optuna study, SQLite."""
        return self.path / "study.db"

    @property
    def checkpoints(self) -> Path:
        """The last states of unfinished trials."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """The trials' curves for TensorBoard, a folder each."""
        return self.path / "tensorboard"

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make a new run's folder, or take one that a search left before it had begun.

        Raises:
            RunFolderError: it exists, or cannot be made.
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
        """Open an existing run's folder.

        Raises:
            RunFolderError: it is none.
        """
        try:
            if (path / "search.yaml").is_file():
                return cls(path)
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
        """Read search.yaml.

        Raises:
            RunFolderError: it is damaged.
        """
        try:
            data = yaml.safe_load(self.search.read_text(encoding="utf-8"))
        except (
            *(OSError, yaml.YAMLError),
            # PyYAML lets these through: a date such as 2024-99-99, endless nesting.
            *(ValueError, LookupError, AttributeError, TypeError, RecursionError),
        ) as error:
            raise RunFolderError(
                f"{self.search} cannot be read: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(data, dict):
            raise RunFolderError(
                f"{self.search} is damaged: a mapping was expected; put back a copy"
            )
        return data

    def write_search(self, data: dict[str, Any]) -> None:
        """Write search.yaml.

        Raises:
            OSError: it could not be written.
        """
        replace_file(self.search, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[None]:
        """Hold the right to write to the run; it ends with the process, however that ends.

        Raises:
            RunFolderError: another process holds it.
        """
        # The lock is the system's, not the file's being there: a killed process holds none.
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
    """Refuse early, before anything is started, what `RunFolder.create` would refuse.

    Raises:
        RunFolderError: the folder exists, or its parent cannot be written to.
    """
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
        # No question about permissions tells of a read-only disk as well as trying does.
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise _cannot_write(path.parent, error) from error


def _is_abandoned(path: Path) -> bool:
    """Whether a folder has nothing that could be resumed: its search was killed as it made it.

    One that is young may be another's that is just about to begin. Of two that take an old one
    at once, the right to write to it decides.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    if time.time() - path.stat().st_mtime < _BEGINNING:
        return False
    checkpoints = path / "checkpoints"
    others = {found.name for found in path.iterdir() if not found.match(".search.yaml.*.tmp")}
    return others <= {".lock", "checkpoints"} and not any(checkpoints.glob("*"))


def _exists(path: Path) -> RunFolderError:
    return RunFolderError(
        f"the run {path} exists and is never overwritten: "
        f"choose another name with --run, or go on with it: --resume {path}"
    )


def _cannot_write(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"cannot write to {path} ({error.strerror}): choose a folder with --results-dir"
    )
