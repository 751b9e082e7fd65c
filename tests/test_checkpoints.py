import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.disks import mounted
from support.epochs import epoch_row
from support.processes import running

from tune_mnist.runs.checkpoints import Checkpoint, Checkpoints
from tune_mnist.runs.folder import RunFolder

NO_CHECKPOINTS = (
    *(b"\x00" * 9000, b"\n", b"7\n", b"[]\n", b"[" * 100_000, b"{}\n", b"\xff\n"),
    b'{"row": {}, "size": 0, "crc32": 0}\n',
    b'{"row": 3, "size": 0, "crc32": 0}\n',
    b'{"row": null, "size": 0, "crc32": 0}\n',
)


def checkpoint(epoch: int) -> Checkpoint:
    return Checkpoint(epoch_row(7, epoch, 0.25), b"weights\n\x00" * 1000 + bytes([epoch]))


def save(checkpoints: Checkpoints, *epochs: int, trial: int = 7) -> None:
    for epoch in epochs:
        saved = checkpoint(epoch)
        checkpoints.save(trial, saved.row, saved.state)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


@pytest.fixture
def saved(folder: RunFolder) -> Checkpoints:
    """Checkpoints with trial 7 saved after its epochs 1, 2 and 3."""
    checkpoints = Checkpoints(folder)
    save(checkpoints, 1, 2, 3)
    return checkpoints


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


def test_the_newest_state_is_loaded_and_the_one_before_is_kept(
    folder: RunFolder, saved: Checkpoints
) -> None:
    for checkpoints in (saved, Checkpoints(folder)):
        assert checkpoints.load(7) == checkpoint(3)
    assert names(folder) == ["00007.before.state", "00007.state"]
    assert saved.load(8) is None


def test_a_damaged_or_missing_newest_state_falls_back_to_the_one_before(
    folder: RunFolder, saved: Checkpoints
) -> None:
    newest = folder.checkpoints / "00007.state"
    sound = newest.read_bytes()
    one_bit_flipped = sound[:-3] + bytes([sound[-3] ^ 4]) + sound[-2:]
    cut_short = [sound[:length] for length in (0, 1, 100, 200, 5000, -1)]
    newest.unlink()
    assert saved.load(7) == checkpoint(2)
    for damaged in (*NO_CHECKPOINTS, one_bit_flipped, *cut_short):
        newest.write_bytes(damaged)
        assert saved.load(7) == checkpoint(2), damaged[:100]
    save(saved, 3)  # the epoch again, and on
    assert saved.load(7) == checkpoint(3)


def test_states_ahead_of_the_rows_or_not_sound_are_passed_over(
    folder: RunFolder, saved: Checkpoints
) -> None:
    assert saved.load(7, up_to=3) == checkpoint(3)
    assert saved.load(7, up_to=2) == checkpoint(2)
    assert saved.load(7, up_to=1) is None
    for name in names(folder):
        (folder.checkpoints / name).write_bytes(b"")
    assert saved.load(7) is None


def test_a_diverged_epochs_row_is_read_as_it_was_written(folder: RunFolder) -> None:
    row = replace(checkpoint(1).row, val_loss=math.nan, train_loss=math.inf, diverged_step=33)
    checkpoints = Checkpoints(folder)
    checkpoints.save(7, row, b"")
    loaded = checkpoints.load(7)
    assert loaded is not None
    assert repr(loaded.row) == repr(row)


@pytest.mark.root
def test_a_disk_without_room_leaves_both_states(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        folder = RunFolder.create(disk / "run")
        checkpoints = Checkpoints(folder)
        save(checkpoints, 1, 2)
        checkpoints.save_best(b"best")
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(7, checkpoint(3).row, b"x" * 60_000)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save_best(b"x" * 60_000)
        assert checkpoints.load(7) == checkpoint(2)
        assert checkpoints.load(7, up_to=1) == checkpoint(1)
        assert folder.best_model.read_bytes() == b"best"
        assert names(folder) == ["00007.before.state", "00007.state"]


def test_only_unfinished_trials_leave_states(folder: RunFolder, saved: Checkpoints) -> None:
    for number in (8, 100_000):
        save(saved, 1, 2, trial=number)
    (folder.checkpoints / "notes.state").touch()
    saved.remove_others({8})
    assert names(folder) == ["00008.before.state", "00008.state", "notes.state"]
    saved.remove(8)
    saved.remove(8)
    assert names(folder) == ["notes.state"]


def test_a_kill_at_any_instant_leaves_the_newest_state_or_the_one_before(
    folder: RunFolder,
) -> None:
    code = """
import os
from support.epochs import epoch_row
from tune_mnist.runs.checkpoints import Checkpoints
from tune_mnist.runs.folder import RunFolder
checkpoints, told = Checkpoints(RunFolder(Path(sys.argv[1]))), os.open(sys.argv[2], os.O_WRONLY)
for epoch in range(1, 10**9):
    checkpoints.save(7, epoch_row(7, epoch, 0.25), b"%09d" % epoch * 30_000)
    os.pwrite(told, b"%09d" % epoch, 0)
    if epoch == 1: print(flush=True)
"""
    told = folder.path / "told"
    told.touch()
    for attempt in range(3):
        with running(code, folder.path, told):
            time.sleep(0.03 + 0.011 * attempt)
        loaded = Checkpoints(folder).load(7)
        assert loaded is not None
        epoch = loaded.row.epoch
        assert loaded.state == b"%09d" % epoch * 30_000
        assert int(told.read_text()) - 1 <= epoch <= int(told.read_text()) + 1
