"""Where a run's copy is: in a bucket, or in a folder that machines share.

Storage is named by URIs as Arrow's file systems, and so Ray's, have them; they do the transfers.
"""

import contextlib
import functools
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

from tune_mnist.errors import ConfigError, RunFolderError, did_you_mean, one_line
from tune_mnist.runs.files import replace_file

SCHEMES = ("s3", "gs", "abfs", "file")
PATIENCE = 5  # seconds for an answer; a request is tried twice
_FLAGS = {"true": True, "false": False}
_PROBE = ".probe"


def is_uri(text: str) -> bool:
    return "://" in text


def storage_uri(text: str) -> str:
    """Return the URI of a folder of runs, given as a URI or a path, or raise ConfigError."""
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

    @classmethod
    def within(cls, storage: str, name: str) -> "RemoteRun":
        parts = urlsplit(storage)
        return cls(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl())

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
            path = Path(root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content, sync=False)
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
