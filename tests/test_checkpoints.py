import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.disks import mounted
from support.epochs import epoch_metrics
from support.processes import running

from tune_mnist.runs.checkpoints import Checkpoint, Checkpoints
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import EpochRow


def row_of(epoch: int) -> EpochRow:
    return EpochRow(**epoch_metrics(epoch, 0.25).as_dict(), trial=7, elapsed=0.25)


def state_of(epoch: int) -> bytes:
    return b"weights\n\x00" * 1000 + bytes([epoch])


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


@pytest.fixture
def saved(folder: RunFolder) -> Checkpoints:
    """Checkpoints with trial 7 saved after its epochs 1, 2 and 3."""
    checkpoints = Checkpoints(folder)
    for epoch in (1, 2, 3):
        checkpoints.save(7, row_of(epoch), state_of(epoch))
    return checkpoints


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


def newest_of(folder: RunFolder) -> Path:
    return folder.checkpoints / "00007.state"


def test_the_newest_state_is_loaded_and_the_one_before_is_kept(
    folder: RunFolder, saved: Checkpoints
) -> None:
    assert saved.load(7) == Checkpoint(row_of(3), state_of(3))
    assert Checkpoints(folder).load(7) == Checkpoint(row_of(3), state_of(3))
    assert names(folder) == ["00007.before.state", "00007.state"]
    assert saved.load(8) is None


@pytest.mark.parametrize("length", [0, 1, 100, 200, 5000, -1])
def test_a_newest_state_cut_short_falls_back_to_the_one_before(
    folder: RunFolder, saved: Checkpoints, length: int
) -> None:
    content = newest_of(folder).read_bytes()
    newest_of(folder).write_bytes(content[:length])
    assert saved.load(7) == Checkpoint(row_of(2), state_of(2))
    saved.save(7, row_of(3), state_of(3))  # the epoch again, and on
    assert saved.load(7) == Checkpoint(row_of(3), state_of(3))


@pytest.mark.parametrize(
    "content",
    [b"\x00" * 9000, b"\n", b"7\n", b"[]\n", b"[" * 100_000, b"{}\n", b"\xff\n",
     b'{"row": {}, "size": 0, "crc32": 0}\n', b'{"row": 3, "size": 0, "crc32": 0}\n',
     b'{"row": null, "size": 0, "crc32": 0}\n'],
)  # fmt: skip
def test_a_damaged_newest_state_falls_back_to_the_one_before(
    folder: RunFolder, saved: Checkpoints, content: bytes
) -> None:
    newest_of(folder).write_bytes(content)
    assert saved.load(7) == Checkpoint(row_of(2), state_of(2))


def test_one_flipped_bit_is_noticed(folder: RunFolder, saved: Checkpoints) -> None:
    content = bytearray(newest_of(folder).read_bytes())
    content[-3] ^= 4
    newest_of(folder).write_bytes(content)
    assert saved.load(7) == Checkpoint(row_of(2), state_of(2))


def test_a_missing_newest_state_falls_back_to_the_one_before(
    folder: RunFolder, saved: Checkpoints
) -> None:
    newest_of(folder).unlink()
    assert saved.load(7) == Checkpoint(row_of(2), state_of(2))


def test_without_any_sound_state_a_trial_starts_over(
    folder: RunFolder, saved: Checkpoints
) -> None:
    for name in names(folder):
        (folder.checkpoints / name).write_bytes(b"")
    assert saved.load(7) is None


def test_states_ahead_of_the_rows_are_passed_over(saved: Checkpoints) -> None:
    assert saved.load(7, up_to=3) == Checkpoint(row_of(3), state_of(3))
    assert saved.load(7, up_to=2) == Checkpoint(row_of(2), state_of(2))
    assert saved.load(7, up_to=1) is None


def test_a_diverged_epochs_row_is_read_as_it_was_written(folder: RunFolder) -> None:
    row = replace(row_of(1), val_loss=math.nan, train_loss=math.inf, diverged_step=33)
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
        checkpoints.save(7, row_of(1), state_of(1))
        checkpoints.save(7, row_of(2), state_of(2))
        checkpoints.save_best(b"best")
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(7, row_of(3), b"x" * 60_000)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save_best(b"x" * 60_000)
        assert checkpoints.load(7) == Checkpoint(row_of(2), state_of(2))
        assert checkpoints.load(7, up_to=1) == Checkpoint(row_of(1), state_of(1))
        assert folder.best_model.read_bytes() == b"best"
        assert names(folder) == ["00007.before.state", "00007.state"]


def test_only_unfinished_trials_leave_states(folder: RunFolder, saved: Checkpoints) -> None:
    for number in (8, 100_000):
        saved.save(number, row_of(1), b"")
        saved.save(number, row_of(2), b"")
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
from test_checkpoints import Checkpoints, RunFolder, row_of
checkpoints, told = Checkpoints(RunFolder(Path(sys.argv[1]))), os.open(sys.argv[2], os.O_WRONLY)
for epoch in range(1, 10**9):
    checkpoints.save(7, row_of(epoch), b"%09d" % epoch * 30_000)
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
