"""Where a run's copy is, in a bucket or in a folder that machines share, and who may write there.

Storage is named by URIs as Arrow's file systems, and so Ray's, have them; they do the transfers.
"""

import contextlib
import functools
import hashlib
import json
import platform
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from pyarrow import ArrowException
from pyarrow.fs import (
    AwsStandardS3RetryStrategy,
    FileSelector,
    FileSystem,
    LocalFileSystem,
    S3FileSystem,
    resolve_s3_region,
)

from tune_mnist.cli import tell
from tune_mnist.errors import ConfigError, RunFolderError, one_line
from tune_mnist.locations import local_path, overlap
from tune_mnist.runs.files import replace_file

PATIENCE = 5  # seconds for an answer; a request is tried twice
_FLAGS = {"true": True, "false": False}
_PROBE = ".probe"
LEASE = 60.0  # seconds without a sign of life after which a driver is taken for dead
SIGN_EVERY = 15.0  # seconds between two signs of life
LOOK_EVERY = 1.0  # seconds between two looks at whether another driver gives one
_DRIVER = ".driver"  # in the copy: who writes there
_FOLDER = ".folder"  # in a run's folder: its name among all folders of all machines


@dataclass(frozen=True)
class RemoteRun:
    """The files of one run's copy, by their names within the run's folder.

    What reads or writes raises OSError or ArrowException if it fails; see `reaching`.
    """

    uri: str

    @property
    def name(self) -> str:
        return unquote(PurePosixPath(urlsplit(self.uri).path).name)

    @property
    def storage(self) -> str:
        """The folder of runs that contains this one, as for `--storage`."""
        parts = urlsplit(self.uri)
        return parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]).geturl()

    @property
    def is_local(self) -> bool:
        """Whether it is a folder, which this machine may share, and no bucket."""
        return local_path(self.uri) is not None

    @classmethod
    def within(cls, storage: str, name: str) -> "RemoteRun":
        parts = urlsplit(storage)
        return cls(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl())

    @classmethod
    def of(cls, folder: Path, storage: str) -> "RemoteRun":
        """Return a run's copy in a folder of runs, or raise RunFolderError if it is the run."""
        copy = cls.within(storage, folder.resolve().name)
        copy.check_is_apart(folder)
        return copy

    def check_is_apart(self, folder: Path) -> None:
        """Raise RunFolderError if a run's folder and its copy are one place, or one in the other.

        The copy would be written over what it is made from, or hold a copy of itself.
        """
        there = local_path(self.uri)
        if there is not None and overlap(folder, there):
            raise RunFolderError(
                f"{folder} and its copy {self.uri} are one place, or one lies in the other: "
                "choose another --storage, or resume the folder itself, by its path"
            )

    def make(self) -> None:
        """Make the folder that the copy lies in; a bucket has none."""
        files, root = _open(self.uri)
        if isinstance(files, LocalFileSystem):
            Path(root).mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Return all files but those whose name begins with a dot, which are no results."""
        files, root = _open(self.uri)
        found = files.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
        names = (PurePosixPath(f.path).relative_to(root) for f in found if f.is_file)
        return [str(name) for name in names if not any(p.startswith(".") for p in name.parts)]

    def read(self, name: str) -> bytes:
        """Return a file's content; no bytes if there is no such file."""
        files, root = _open(self.uri)
        try:
            with files.open_input_stream(f"{root}/{name}") as file:
                return bytes(file.read())
        except FileNotFoundError:
            return b""

    def write(self, name: str, content: bytes) -> None:
        """Replace a whole file; readers see the old one or the new one."""
        files, root = _open(self.uri)
        if isinstance(files, LocalFileSystem):
            # Not the root: where its disk is away, that would be made on what lies beneath.
            for parent in reversed(PurePosixPath(name).parents):
                if parent.name:
                    Path(root, parent).mkdir(exist_ok=True)
            replace_file(Path(root, name), content, sync=False)
        else:  # a bucket replaces whole objects
            with files.open_output_stream(f"{root}/{name}") as file:
                file.write(content)

    def delete(self, name: str) -> None:
        files, root = _open(self.uri)
        with contextlib.suppress(FileNotFoundError):
            files.delete_file(f"{root}/{name}")

    def time_of(self, name: str) -> datetime | None:
        """Return when a file was written by the storage's own clock; None if it does not exist."""
        files, root = _open(self.uri)
        time: datetime | None = files.get_file_info(f"{root}/{name}").mtime
        return time

    def now(self) -> datetime:
        """Return the time by the storage's clock, by writing a file and deleting it."""
        self.write(_PROBE, b"written to see whether it can be, and when")
        now = self.time_of(_PROBE)
        self.delete(_PROBE)
        if now is None:
            raise OSError("what was just written there is not there")
        return now


@functools.cache
def _open(uri: str) -> tuple[FileSystem, str]:
    """Return Arrow's file system for a URI and the path in it, or raise ConfigError.

    By default, Arrow tries for minutes to reach a bucket that does not answer.
    """
    parts = urlsplit(uri)
    options: dict[str, Any] = {
        name: _FLAGS.get(value, value) for name, value in parse_qsl(parts.query)
    }
    try:
        if parts.scheme == "s3":
            return _s3(parts.netloc, options), (parts.netloc + unquote(parts.path)).rstrip("/")
        if parts.scheme == "gs":
            options["retry_limit_seconds"] = PATIENCE
            parts = parts._replace(query=urlencode(options))
        files, root = FileSystem.from_uri(parts.geturl())
    except (ArrowException, OSError, ImportError, TypeError) as error:
        raise ConfigError(f"{uri} cannot be used: {one_line(error)}") from error
    return files, root.rstrip("/")


def _s3(bucket: str, options: dict[str, Any]) -> S3FileSystem:
    if not options.keys() & {"region", "endpoint_override"}:
        options["region"] = resolve_s3_region(bucket)
    return S3FileSystem(
        **options,
        connect_timeout=PATIENCE,
        request_timeout=PATIENCE,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=2),
        # A small object then takes one request instead of three, and is never left half-written.
        allow_delayed_open=True,
    )


@contextlib.contextmanager
def reaching(remote: RemoteRun) -> Iterator[None]:
    """Turn a failure to read or write a run's copy into one clear RunFolderError."""
    try:
        yield
    except (OSError, ArrowException) as error:
        raise RunFolderError(
            f"cannot use {remote.uri} ({one_line(error)}): see that the bucket or folder exists "
            "and that the credentials at hand allow to write there"
        ) from error


class StoppedError(Exception):
    """Nothing more is to be copied, for a reason in the words that a user is told."""


class Lease:
    """The right of one driver to write to a run's copy, as long as it gives signs of life.

    A bucket knows no lock that ends with a process. So a driver keeps a file there that names it,
    and rewrites it every `SIGN_EVERY` seconds, by a clock that nobody sets and that runs on while
    the machine is suspended. One that has not for `LEASE` seconds is taken for dead; if it lives
    after all, it sees that it was taken over and no longer writes there.

    Two things are not ruled out. If two drivers begin within the same fraction of a second, the
    first to give its next sign of life leaves the copy to the other. And files that were under
    way when a machine was suspended arrive when it wakes up.
    """

    def __init__(self, remote: RemoteRun, folder: Path) -> None:
        """Name this driver; an OSError means that the folder cannot be written."""
        self._remote, self._path = remote, folder
        self._me = {
            "host": platform.node(),
            "machine": _machine(),
            "folder": _name_of(folder),
            "lease": uuid.uuid4().hex,
        }
        self._signs = 0
        self._next_sign = 0.0

    def take(self) -> None:
        """Become the only writer once another's lease has run out, or raise RunFolderError.

        Only for the one process that writes to the local folder: a lease that was taken for the
        same folder is a dead driver's.
        """
        with reaching(self._remote):
            self._wait_for_other()
            self._sign()

    def keep(self) -> bool:
        """Give a sign of life, if it is time to; raise StoppedError if another took over.

        Return False if the last one has vanished: a storage that was away is not taken over.
        """
        if _clock() < self._next_sign:
            return True
        driver = self._driver()
        if driver and driver["lease"] != self._me["lease"]:
            raise self.taken_over()
        self._sign()
        return bool(driver)

    def taken_over(self) -> StoppedError:
        return StoppedError(
            f"{self._remote.uri} is left to another driver, which took this one for dead; "
            f"what this one finds is in {self._path}"
        )

    def release(self) -> None:
        """Let other drivers write there at once."""
        if self._driver().get("lease") == self._me["lease"]:
            self._remote.delete(_DRIVER)

    def _wait_for_other(self) -> None:
        now, last = self._remote.now(), self._last_sign()
        other = self._driver()
        mine = all(other.get(name) == self._me[name] for name in ("machine", "folder"))
        if last is None or mine:
            return
        # A bucket dates its files itself; a folder's may be dated by another machine's clock.
        age = 0.0 if self._remote.is_local else (now - last[0]).total_seconds()
        left = min(LEASE - age, LEASE)
        if left <= 0:
            return
        host = str(other.get("host", ""))[:60]
        host = host if host.isprintable() and host else "another machine"
        tell(f"{self._remote.uri}: seeing for {left:.0f} s whether its driver on {host} is alive")
        deadline = time.monotonic() + left
        while time.monotonic() < deadline:
            time.sleep(LOOK_EVERY)
            sign = self._last_sign()
            if sign is None:
                return
            if sign != last:
                raise RunFolderError(
                    f"{self._remote.uri} is in use: a search on {host} is writing to it; wait "
                    "for it or stop it"
                )

    def _sign(self) -> None:
        self._signs += 1  # no two signs are alike, whatever the storage's clock says
        self._remote.write(_DRIVER, json.dumps(self._me | {"signs": self._signs}).encode())
        self._next_sign = _clock() + SIGN_EVERY

    def _last_sign(self) -> tuple[datetime, bytes] | None:
        when = self._remote.time_of(_DRIVER)
        return None if when is None else (when, self._remote.read(_DRIVER))

    def _driver(self) -> dict[str, Any]:
        """Return who has given the last sign; nothing if there is none that can be read."""
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(self._remote.read(_DRIVER))
            if isinstance(found, dict) and ("lease" in found or "claim" in found):
                return {"lease": found.get("claim"), **found}  # its name in older versions
        return {}


def _clock() -> float:
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _machine() -> str:
    """Return what tells this machine from others; its id itself is not for others to know."""
    known = ""
    with contextlib.suppress(OSError):
        known = Path("/etc/machine-id").read_text().strip()
    return hashlib.sha256(f"tune_mnist {known or uuid.getnode()}".encode()).hexdigest()[:16]


def _name_of(folder: Path) -> str:
    """Return a name that a run's folder keeps when it is moved, and that no copy of it has.

    An OSError means that the folder cannot be written.
    """
    file = folder / _FOLDER
    if not file.exists():
        replace_file(file, uuid.uuid4().hex)
    return f"{file.read_text(errors='replace')[:40]} {folder.stat().st_ino}"
