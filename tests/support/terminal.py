"""A terminal that understands what rich's live view writes."""

import io
import re

from rich.console import Console


class Terminal(io.StringIO):
    """A terminal of 100 columns and what is on it."""

    def __init__(self) -> None:
        super().__init__()
        self.console = Console(file=self, width=100, height=30)
        self._seen = 0

    def isatty(self) -> bool:
        return True

    def news(self) -> str:
        """Return what was written since the last time."""
        self._seen, before = self.tell(), self._seen
        return self.getvalue()[before:]

    @property
    def screen(self) -> list[str]:
        """What a person sees, without blank lines at the end."""
        lines, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", self.getvalue()):
            if part in "\r\n":
                column = 0
                row += part == "\n"
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
