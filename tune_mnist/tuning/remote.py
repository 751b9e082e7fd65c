"""Where a run's copy lies: in a bucket, or in a folder that machines share.

Arrow's file systems speak to it, as they do for Ray.
"""

import contextlib
import json
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from pyarrow import ArrowException
from pyarrow.fs import (
    AwsStandardS3RetryStrategy,
    FileSelector,
    FileSystem,
    FileType,
    LocalFileSystem,
    S3FileSystem,
    resolve_s3_region,
)

from tune_mnist.errors import ConfigError, RunFolderError, did_you_mean

PATIENCE = 5  # seconds for an answer; a request is tried a few times
_FLAGS = {"true": True, "false": False}
_PROBE = ".probe"


@dataclass(frozen=True)
class RemoteRun:
    """The files of one run's copy, by their names within the run's folder."""

    uri: str

    @property
    def name(self) -> str:
        """The run's name."""
        return unquote(PurePosixPath(urlsplit(self.uri).path).name)

    @property
    def storage(self) -> str:
        """The folder of runs that this one is in, as for `--storage`."""
        parts = urlsplit(self.uri)
        return parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]).geturl()

    @classmethod
    def within(cls, storage: str, name: str) -> "RemoteRun":
        """Return where a run of that name lies in a folder of runs."""
        parts = urlsplit(storage)
        return cls(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl())

    def names(self) -> list[str]:
        """Return all files but those with a dot before their name, which are nobody's results.

        Raises:
            OSError, ArrowException: this, like all that follows, could not be done.
        """
        root = PurePosixPath(self._root)
        selector = FileSelector(self._root, recursive=True, allow_not_found=True)
        files = (f for f in self._files.get_file_info(selector) if f.type == FileType.File)
        names = (PurePosixPath(file.path).relative_to(root) for file in files)
        return [str(name) for name in names if not any(p.startswith(".") for p in name.parts)]

    def read(self, name: str) -> bytes:
        """Return a file's content; of one that is not there, none."""
        try:
            with self._files.open_input_stream(f"{self._root}/{name}") as file:
                content: bytes = file.read()
                return content
        except FileNotFoundError:
            return b""

    def write(self, name: str, content: bytes) -> None:
        """Put a whole file in its place; whoever reads it sees the old one or the new."""
        path = PurePosixPath(self._root, name)
        if not isinstance(self._files, LocalFileSystem):  # an object is there as a whole or not
            self._write(path, content)
            return
        self._files.create_dir(str(path.parent), recursive=True)
        temporary = path.with_name(f".{path.name}.{threading.get_ident()}.tmp")
        self._write(temporary, content)
        self._files.move(str(temporary), str(path))

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        try:
            self._files.delete_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return

    def time_of(self, name: str) -> datetime | None:
        """Return when a file was written, by the storage's own clock, or None."""
        time: datetime | None = self._files.get_file_info(f"{self._root}/{name}").mtime
        return time

    def now(self) -> datetime:
        """Return the time by the storage's clock, which takes writing a file and deleting it."""
        self.write(_PROBE, b"written to see whether it can be, and when")
        now = self.time_of(_PROBE)
        self.delete(_PROBE)
        if now is None:
            raise OSError("what was just written there is not there")
        return now

    def _write(self, path: PurePosixPath, content: bytes) -> None:
        with self._files.open_output_stream(str(path)) as file:
            file.write(content)

    @property
    def _files(self) -> FileSystem:
        return self._place[0]

    @property
    def _root(self) -> str:
        return self._place[1]

    @cached_property
    def _place(self) -> tuple[FileSystem, str]:
        try:
            files, root = _open(self.uri)
        except (ArrowException, OSError, ImportError, TypeError) as error:
            raise ConfigError(f"{self.uri} cannot be used: {in_words(error)}") from error
        return files, root.rstrip("/")


def _open(uri: str) -> tuple[FileSystem, str]:
    """Return Arrow's file system for a URI and the path in it.

    Left to itself, Arrow tries for minutes to reach a bucket that does not answer.
    """
    parts = urlsplit(uri)
    options = {name: _FLAGS.get(value, value) for name, value in parse_qsl(parts.query)}
    if parts.scheme == "gs":
        query = urlencode({**options, "retry_limit_seconds": PATIENCE})
        uri = parts._replace(query=query).geturl()
    if parts.scheme != "s3":
        files, root = FileSystem.from_uri(uri)
        return files, root
    if not options.keys() & {"region", "endpoint_override"}:
        options["region"] = resolve_s3_region(parts.netloc)
    files = S3FileSystem(
        **options,
        connect_timeout=PATIENCE,
        request_timeout=PATIENCE,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=2),
        # A small object then takes one request instead of three, and is never left half-made.
        allow_delayed_open=True,
    )
    return files, parts.netloc + unquote(parts.path)


@contextlib.contextmanager
def reaching(remote: RemoteRun) -> Iterator[None]:
    """Turn what keeps a run's copy from being read or written into one clear error.

    Raises:
        RunFolderError: it cannot be reached.
    """
    try:
        yield
    except (OSError, ArrowException) as error:
        raise RunFolderError(
            f"cannot use {remote.uri} ({in_words(error)}): see that the bucket or folder exists "
            "and that the credentials at hand allow to write there"
        ) from error


def in_words(error: BaseException) -> str:
    """Say in a line what a storage answered."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# MERGED-DOC tuning.uri: How storage is named: as Arrow's file systems, and so Ray's, have it.

SCHEMES = ("s3", "gs", "abfs", "file")


def is_uri(text: str) -> bool:
    """Say whether a text is a URI rather than a path."""
    return "://" in text


def storage_uri(text: str) -> str:
    """Return the URI of a folder elsewhere, which may be given as a path.

    Raises:
        ConfigError: it is none that can be used.
    """
    if not is_uri(text):
        return Path(text).absolute().as_uri()
    scheme, _, _ = text.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise ConfigError(
            f"storage of the kind {scheme}:// is not known{did_you_mean(scheme, SCHEMES)}: "
            f"use {known} or a folder's path"
        )
    parts = urlsplit(text)
    if parts.password is not None:
        raise ConfigError(
            "a storage's URI is kept in search.yaml and must not hold a secret: give it as the "
            "cloud's own tools take it, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if scheme != "file" and not parts.netloc:
        raise ConfigError(f"{text} names no bucket: {scheme}://BUCKET/FOLDER")
    return text


# MERGED-DOC tuning.claim: A driver's right to write to a run's copy, for as long as it gives signs
# of life. A bucket knows no lock that ends with a process. So a driver leaves a file there that
# says who it is, and writes it again and again. One that has not for a minute is taken for dead;
# should it live after all, it sees that it was taken over and writes there no more. What this does
# not rule out: two that begin within the same fraction of a second, until the first to give its
# next sign of life sees the other's and leaves the copy to it; and files that were under way when
# a machine was suspended, which arrive when it wakes up.

LEASE = 60.0  # seconds without a sign of life after which a driver is taken for dead
SIGN_EVERY = 15.0  # seconds between two signs of life
LOOK_EVERY = 1.0  # seconds between two looks at whether another gives one
_DRIVER = ".driver"


class TakenOverError(Exception):
    """Another driver has written to the copy; this one was taken for dead."""


class Lease:
    """The right of one driver to write to one run's copy."""

    def __init__(self, remote: RemoteRun, folder: Path) -> None:
        self._remote = remote
        self._place = {"host": platform.node(), "folder": str(folder.resolve())}
        self._me = {**self._place, "claim": uuid.uuid4().hex}
        self._next_sign = 0.0

    def take(self, tell: Callable[[str], None]) -> None:
        """Begin to be the only writer; where another may have died, see first whether it has.

        Only for who alone writes to the local folder: a driver that worked there before is gone.

        Raises:
            RunFolderError: another writes to the copy, or nobody can.
        """
        with reaching(self._remote):
            self._wait_for_other(tell)
            self._sign()

    def keep(self) -> None:
        """Give a sign of life, where it is time to.

        Raises:
            TakenOverError: another driver has taken its place.
            OSError, ArrowException: the storage did not answer.
        """
        if time.time() >= self._next_sign:  # not a clock that stands still in a machine's sleep
            if self._driver() != self._me:  # nor gone: the other may have come to its end
                raise TakenOverError
            self._sign()

    def release(self) -> None:
        """Let others write there at once."""
        if self._driver() == self._me:
            self._remote.delete(_DRIVER)

    def _wait_for_other(self, tell: Callable[[str], None]) -> None:
        now, last, other = self._remote.now(), self._remote.time_of(_DRIVER), self._driver()
        if last is None or self._place.items() <= other.items():
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
        content = self._remote.read(_DRIVER)
        driver: dict[str, Any] = json.loads(content) if content else {}
        return driver
