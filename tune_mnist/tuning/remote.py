"""Where a run's copy lies: in a bucket, or in a folder that machines share.

Arrow's file systems speak to it, as they do for Ray.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import PurePosixPath
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

from tune_mnist.errors import ConfigError, RunFolderError

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
