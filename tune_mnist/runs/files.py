"""Writing and reading files so that neither a reader nor a later session sees half of one.

Whole files are written under a temporary name, then renamed. Logs grow by whole lines; the next
writer drops a line that a killed process left unfinished.
"""

import contextlib
import os
from pathlib import Path


def replace_file(
    path: Path, content: bytes | str, *, keep_as: Path | None = None, sync: bool = True
) -> None:
    """Write a whole file, or raise OSError and leave the old one untouched.

    Readers of `path` see the old content or the new, never half. A symbolic link is followed;
    anything but a plain file, such as /dev/stdout, is written to in place. The old content is kept
    at `keep_as`. `sync` waits for the disk, so that a power cut cannot leave the file empty.
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
    """Remove the temporary files that `replace_file` left in killed processes.

    Only the folder's one writer may call this: another process may be about to rename its file.
    """
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # a leftover does no harm
            path.unlink()


class AppendLog:
    """A text file that grows by whole lines.

    The operating system has each line before `append` returns, so a killed process loses none. A
    power cut can lose the last seconds unless `sync` is called.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def read(self) -> list[bytes]:
        """Return the finished lines without their ends, none if there is no file."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        return content.split(b"\n")[:-1]

    def append(self, line: str) -> None:
        """Add a line; an OSError, such as a full disk, leaves the log without any of it."""
        if self._file is None:
            self._file = self._open()
        content = f"{line}\n".encode()
        size = os.fstat(self._file).st_size
        try:
            while content:  # a nearly full disk first writes a part, then reports the error
                content = content[os.write(self._file, content) :]
        except BaseException:
            # If this fails too, the next process to open the file cuts the line off.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            self.close()
            raise

    def sync(self) -> None:
        """Wait until all lines are on the disk, or raise OSError."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)

    def _open(self) -> int:
        """Open the file for appending and cut off an unfinished last line."""
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            content = self.path.read_bytes()
            finished = content.rfind(b"\n") + 1
            if finished < len(content):
                os.ftruncate(file, finished)
        except BaseException:
            os.close(file)
            raise
        return file
