"""The saved states of unfinished trials, and the model of the best one.

A checkpoint is a line of JSON (the epoch's row, the state's length and checksum), then the state.
The one before is kept beside it, for the case that the newest cannot be read. Nothing here is
unpickled: the worker reads the state with torch's weights-only loader.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from tune_mnist.analysis.files import replace_file
from tune_mnist.analysis.history import Row
from tune_mnist.analysis.run import RunFolder


@dataclass(frozen=True)
class Checkpoint:
    """A trial's state after an epoch, and what the epoch came to."""

    row: Row
    state: bytes


class Checkpoints:
    """The checkpoints of a run, kept in its folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def save(self, number: int, row: Row, state: bytes) -> None:
        """Keep a trial's newest state, and the one before.

        Raises:
            OSError: it could not be written; the older ones are untouched.
        """
        newest, before = self._paths(number)
        header = {"row": row, "size": len(state), "crc32": zlib.crc32(state)}
        content = json.dumps(header).encode() + b"\n" + state
        if newest.exists():
            newest.replace(before)
        replace_file(newest, content)

    def load(self, number: int) -> Checkpoint | None:
        """Return a trial's newest state that can be read, or None."""
        for path in self._paths(number):
            try:
                header, _, state = path.read_bytes().partition(b"\n")
                facts = json.loads(header)
                if (len(state), zlib.crc32(state)) == (facts["size"], facts["crc32"]):
                    return Checkpoint(row=facts["row"], state=state)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # absent or damaged: the one before, or from the start
        return None

    def remove(self, number: int) -> None:
        """Drop a finished trial's states."""
        for path in self._paths(number):
            path.unlink(missing_ok=True)

    def save_best(self, model: bytes) -> None:
        """Keep the best trial's model, a file that its worker has made.

        Raises:
            OSError: it could not be written; the one before is untouched.
        """
        replace_file(self._folder.best_model, model)

    def _paths(self, number: int) -> tuple[Path, Path]:
        stem = self._folder.checkpoints / f"{number:05d}"
        return stem.with_suffix(".state"), stem.with_suffix(".before.state")
