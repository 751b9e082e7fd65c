"""Writing and reading a run's files so that no reader, and no later session, sees half of one.

Whole files go to a temporary name and then take their place at once. Logs grow by whole lines; a
line that a killed process left unfinished is dropped when the log is opened again.
"""

import os
from pathlib import Path


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a whole file; whoever reads `path` sees the old content or the new, never half.

    Raises:
        OSError: the file could not be written; the old one is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class AppendLog:
    """A text file that grows by whole lines.

    Every line is handed to the operating system in one write before `append` returns, so a killed
    process loses none. There is no fsync: a power cut can cost the last seconds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def read(self) -> list[str]:
        """Return the finished lines, without their line ends."""
        if not self.path.exists():
            return []
        return self._finished(self.path.read_bytes()).decode("utf-8").splitlines()

    def append(self, line: str) -> None:
        """Add a line, all of it or nothing.

        Raises:
            OSError: the line could not be written, as with a full disk.
        """
        if self._file is None:
            self._cut_unfinished_line()
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        content = f"{line}\n".encode()
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, content)
            if written < len(content):  # the disk took only a part: ask for the rest's reason
                os.write(self._file, content[written:])
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _cut_unfinished_line(self) -> None:
        if self.path.exists():
            content = self.path.read_bytes()
            finished = self._finished(content)
            if len(finished) < len(content):
                os.truncate(self.path, len(finished))

    @staticmethod
    def _finished(content: bytes) -> bytes:
        return content[: content.rfind(b"\n") + 1]
