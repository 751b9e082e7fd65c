"""A pseudo-terminal that understands what rich's live view writes."""

import os
import pty
import re

from rich.console import Console


class Terminal:
    """A terminal of 100 columns and what is on it."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self._file = os.fdopen(slave, "w", encoding="utf-8")
        self.console = Console(file=self._file, width=100, height=30)
        self.received = ""

    def read(self) -> str:
        """Return what was written since the last time."""
        self._file.flush()
        os.set_blocking(self._master, False)
        new = b""
        try:
            while chunk := os.read(self._master, 65536):
                new += chunk
        except BlockingIOError:
            pass
        self.received += new.decode()
        return new.decode()

    @property
    def screen(self) -> list[str]:
        """What a person sees, without blank lines at the end."""
        self.read()
        lines, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", self.received):
            if part == "\r":
                column = 0
            elif part == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif part.endswith("A") and part.startswith("\x1b"):
                row = max(row - int(part[2:-1] or 1), 0)
            elif part == "\x1b[2K":
                lines[row] = ""
            elif not part.startswith("\x1b"):
                lines[row] = lines[row][:column].ljust(column) + part
                column += len(part)
        while lines and not lines[-1].strip():
            lines.pop()
        return lines

    def close(self) -> None:
        self._file.close()
        os.close(self._master)
