"""The trials' curves and hyperparameters for TensorBoard: `tensorboard --logdir results/<run>`."""

import math
from pathlib import Path
from typing import Any

from tune_mnist.analysis.history import Row, TrialRecord
from tune_mnist.analysis.ranking import number

_NAME = "events.out.tfevents.0"  # by which TensorBoard knows its files
_SCALARS = (
    *("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy"),
    *("seconds", "evaluation_seconds"),
)


class EventFiles:
    """Writes an event file for each trial into a folder of its own, named after its number.

    They are written anew in every session, so a trial that was broken off goes on without a gap
    and without an epoch twice, whenever the kill came. What an earlier session wrote comes out
    the same, byte by byte, so that a TensorBoard which is half through a file reads on.
    """

    def __init__(self, folder: Path) -> None:
        # Here and not above: a thread may take its time for them.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._hparams = Event, Summary, hparams_pb
        self._writer, self._writers = RecordWriter, dict[int, RecordWriter]()
        self._folder = folder
        # A trial's name among the runs that TensorBoard may look at together.
        self._run = "/".join(folder.absolute().parts[-3:-1])

    def begin(self, record: TrialRecord) -> int:
        """Begin a trial's file with its hyperparameters."""
        path = self._folder / f"{record.number}" / _NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writers[record.number] = self._writer(path.open("wb"))
        began = record.started_at
        self._write(record, self._event(wall_time=began, file_version="brain.Event:2"))
        values = {**record.config, "seed": record.seed}
        hparams = self._hparams(values, f"{self._run}/{record.number}", began)
        self._write(record, self._event(wall_time=began, summary=hparams))
        return 0

    def add_epoch(self, record: TrialRecord, row: Row) -> None:
        """Write an epoch's measurements, by the names that they have in epochs.csv."""
        summary = self._summary(
            value=[
                self._summary.Value(tag=name, simple_value=number(row, name))
                for name in _SCALARS
                if math.isfinite(number(row, name))
            ]
        )
        when = record.started_at + number(row, "elapsed") - record.started
        self._write(record, self._event(wall_time=when, step=row["epoch"], summary=summary))

    def end(self, record: TrialRecord) -> None:
        """Close a trial's file."""
        self._writers.pop(record.number).close()

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Close all files."""
        while self._writers:
            self._writers.popitem()[1].close()

    def _write(self, record: TrialRecord, event: Any) -> None:
        self._writers[record.number].write(event.SerializeToString(deterministic=True))
