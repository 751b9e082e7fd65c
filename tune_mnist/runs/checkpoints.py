"""The saved states of unfinished trials, and the best trial's model.

A checkpoint is a line of JSON, then the state. The line says what the state is of: form, epoch,
configuration and seed, its length and checksum, and a checksum of all this. The previous one is
kept beside it: neither write waits for the disk, so a power cut may leave the newest empty or cut
short. Nothing here is unpickled; the worker reads the state with torch's weights-only loader.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from tune_mnist.errors import RunFolderError
from tune_mnist.runs.files import read_plain, replace_file
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import EpochRow, TrialRecord

FORM = 2  # of a state and of its configuration: a change to either needs the next number
_UNNUMBERED = {"row", "size", "crc32"}  # the header before forms had numbers
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Checkpoint:
    """A trial's state after an epoch, and that epoch's row."""

    row: EpochRow
    state: bytes


class Checkpoints:
    """The checkpoints of a run, kept in its folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def check(self, records: Iterable[TrialRecord]) -> None:
        """Raise RunFolderError if another version wrote the state of one of these trials."""
        for record in records:
            self.load(record)

    def save(self, record: TrialRecord, row: EpochRow, state: bytes) -> None:
        """Save a trial's newest state and keep the previous one; an OSError changes neither."""
        newest, before = self._paths(record.number)
        header = {
            "form": FORM,
            "row": vars(row),
            **_identity(record),
            "size": len(state),
            "crc32": zlib.crc32(state),
        }
        header["header_crc32"] = _checksum(header)
        content = json.dumps(header).encode() + b"\n" + state
        replace_file(newest, content, keep_as=before, sync=False)

    def load(self, record: TrialRecord, *, up_to: float = math.inf) -> Checkpoint | None:
        """Return a trial's newest sound state up to an epoch; None: it starts from its beginning.

        After a power cut a checkpoint can be ahead of `epochs.csv`; resuming from it would leave a
        gap there. Raises RunFolderError if another version wrote the state.
        """
        found = [self._read(path, record) for path in self._paths(record.number)]
        sound = [each for each in found if each is not None and each.row.epoch <= up_to]
        return max(sound, key=lambda each: each.row.epoch, default=None)

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

    def _read(self, path: Path, record: TrialRecord) -> Checkpoint | None:
        """Return what a file holds of a trial; None if it is missing, damaged or another's."""
        try:
            header, state = _opened(read_plain(path))
            if header["form"] == FORM:
                return _checkpoint(header, record, state)
        except _DAMAGE:
            return None
        raise RunFolderError(
            f"{path} was written by another version of tune_mnist (its form is {header['form']}, "
            f"here it is {FORM}): resume with that version, or empty {path.parent} to train the "
            "unfinished trials from their beginning"
        )


def is_whole(content: bytes) -> bool:
    """Return True if a checkpoint's file holds the state that was written."""
    try:
        _opened(content)
    except _DAMAGE:
        return False
    return True


def is_whole_model(content: bytes) -> bool:
    """Return True if a file is a model as torch writes it, to its end: a zip file."""
    try:
        return zipfile.ZipFile(BytesIO(content)).testzip() is None
    except zipfile.BadZipFile:
        return False


def _identity(record: TrialRecord) -> dict[str, Any]:
    return {"config": record.config.as_dict(), "seed": record.seed}


def _checksum(header: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(header).encode())


def _opened(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return a checkpoint's header and state; a damaged one raises one of `_DAMAGE`."""
    line, _, state = content.partition(b"\n")
    header = json.loads(line)
    if header.keys() == _UNNUMBERED:
        # At first the optimizer's memory had the form that torch gives it.
        header["form"] = 1 if b"param_groups" in state else 2
    elif header.pop("header_crc32") != _checksum(header):
        raise ValueError("the header is not the one that was written")
    if (len(state), zlib.crc32(state)) != (header["size"], header["crc32"]):
        raise ValueError("the state is not the one that was written")
    return header, state


def _checkpoint(header: Mapping[str, Any], record: TrialRecord, state: bytes) -> Checkpoint:
    """Return a trial's checkpoint; one of another trial or run raises one of `_DAMAGE`."""
    row = EpochRow.of(header["row"])
    identity = _identity(record)  # earlier headers do not have it
    if row.trial != record.number or any(
        header.get(n, identity[n]) != identity[n] for n in identity
    ):
        raise ValueError("the state is of another trial, configuration or seed")
    return Checkpoint(row, state)
