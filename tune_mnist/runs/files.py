"""Writing and reading a run's files so that no reader, and no later session, sees half of one.

Whole files go to a temporary name and then take their place at once. Logs grow by whole lines; a
line that a killed process left unfinished is dropped when the log is opened again.
"""

import contextlib
import os
from pathlib import Path


def replace_file(
    path: Path, content: bytes | str, *, keep_as: Path | None = None, sync: bool = True
) -> None:
    """Write a whole file; whoever reads `path` sees the old content or the new, never half.

    Args:
        path: the file; of a symbolic link, the file it points to. What is no plain file, such as
            /dev/stdout, is written to and stays what it is.
        content: all of it.
        keep_as: where the old content goes, once the new one is safely written.
        sync: wait for the disk, so that a power cut cannot leave the file empty.

    Raises:
        OSError: the file could not be written; the old one is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    if path.is_symlink():
        path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            path.replace(keep_as)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what `replace_file` had begun in processes that were killed.

    Only for who alone writes to the folder: another's file may be just about to take its place.
    """
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # they do no harm
            path.unlink()


class AppendLog:
    """A text file that grows by whole lines.

    Every line is handed to the operating system before `append` returns, so a killed process
    loses none. Against a power cut there is `sync`; without it, one can cost the last seconds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def read(self) -> list[bytes]:
        """Return the finished lines, without their line ends; none if there is no file.

        Raises:
            OSError: the file cannot be read.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        return content.split(b"\n")[:-1]

    def append(self, line: str) -> None:
        """Add a line, all of it or nothing.

        Raises:
            OSError: the line could not be written, as with a full disk.
        """
        if self._file is None:
            self._file = self._open()
        content = f"{line}\n".encode()
        size = os.fstat(self._file).st_size
        try:
            while content:  # a nearly full disk takes a part first, and then says why
                content = content[os.write(self._file, content) :]
        except BaseException:
            # Where even that fails, the next to open the file does it.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            self.close()
            raise

    def sync(self) -> None:
        """Wait until the disk has all lines.

        Raises:
            OSError: it cannot take them.
        """
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)

    def _open(self) -> int:
        """Open the file for appending, without a line that a killed process left unfinished."""
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            content = self.path.read_bytes()
            if _end_of_lines(content) < len(content):
                os.ftruncate(file, _end_of_lines(content))
        except BaseException:
            os.close(file)
            raise
        return file


def _end_of_lines(content: bytes) -> int:
    return content.rfind(b"\n") + 1
