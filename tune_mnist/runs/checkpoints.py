"""The saved states of unfinished trials, and the best trial's model.

A checkpoint is a line of JSON (the epoch's row, the state's length and checksum), then the state.
The previous one is kept beside it: neither write waits for the disk, so a power cut may leave the
newest empty or cut short. Nothing here is unpickled; the worker reads the state with torch's
weights-only loader.
"""

import contextlib
import json
import math
import zlib
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from tune_mnist.runs.files import read_plain, replace_file
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import EpochRow


@dataclass(frozen=True)
class Checkpoint:
    """A trial's state after an epoch, and that epoch's row."""

    row: EpochRow
    state: bytes


class Checkpoints:
    """The checkpoints of a run, kept in its folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def save(self, number: int, row: EpochRow, state: bytes) -> None:
        """Save a trial's newest state and keep the previous one; an OSError changes neither."""
        newest, before = self._paths(number)
        header = {"row": vars(row), "size": len(state), "crc32": zlib.crc32(state)}
        content = json.dumps(header).encode() + b"\n" + state
        replace_file(newest, content, keep_as=before, sync=False)

    def load(self, number: int, *, up_to: float = math.inf) -> Checkpoint | None:
        """Return a trial's newest readable state up to an epoch, or None.

        After a power cut a checkpoint can be ahead of `epochs.csv`; resuming from it would leave a
        gap there.
        """
        for path in self._paths(number):
            # Missing or damaged: try the previous one, then start over.
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
                checkpoint = _parse(read_plain(path))
                if checkpoint.row.trial == number and checkpoint.row.epoch <= up_to:
                    return checkpoint
        return None

    def remove(self, number: int) -> None:
        for path in self._paths(number):
            path.unlink(missing_ok=True)

    def remove_others(self, unfinished: Container[int]) -> None:
        """Remove all states but these trials'; a kill right after a trial's end leaves some."""
        for path in self._folder.checkpoints.glob("*.state"):
            number = path.name.partition(".")[0]
            if number.isdigit() and int(number) not in unfinished:
                path.unlink(missing_ok=True)

    def save_best(self, model: bytes) -> None:
        """Write the best trial's model, as its worker packed it; an OSError leaves the old one."""
        replace_file(self._folder.best_model, model)

    def _paths(self, number: int) -> tuple[Path, Path]:
        stem = self._folder.checkpoints / f"{number:05d}"
        return stem.with_suffix(".state"), stem.with_suffix(".before.state")


def is_whole(content: bytes) -> bool:
    """Return True if a checkpoint's file holds the state that was written."""
    header, _, state = content.partition(b"\n")
    try:
        facts = json.loads(header)
        return (len(state), zlib.crc32(state)) == (facts["size"], facts["crc32"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def _parse(content: bytes) -> Checkpoint:
    """Read a checkpoint; a damaged one raises one of the errors that `load` suppresses."""
    if not is_whole(content):
        raise ValueError("the state is not the one that was written")
    header, _, state = content.partition(b"\n")
    return Checkpoint(EpochRow.of(json.loads(header)["row"]), state)
