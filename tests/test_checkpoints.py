import json
import math
import os
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.disks import mounted
from support.epochs import epoch_row
from support.processes import running

from tune_mnist.errors import RunFolderError
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.runs.checkpoints import Checkpoint, Checkpoints
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import TrialRecord

TRIAL = TrialRecord(7, TrainConfig(lr=0.02), 1007, "sampled")
NO_CHECKPOINTS = (
    *(b"", b"\x00" * 9000, b"\n", b"7\n", b"[]\n", b"[" * 100_000, b"{}\n", b"\xff\n"),
    *(b'{"header_crc32": 3}\n', b'{"row": {}, "size": 0, "crc32": 0}\n'),
    b'{"row": 3, "size": 0, "crc32": 0}\n',
    b'{"row": null, "size": 0, "crc32": 0}\n',
)


def checkpoint(epoch: int, trial: int = 7) -> Checkpoint:
    return Checkpoint(epoch_row(trial, epoch, 0.25), b"weights\n\x00" * 1000 + bytes([epoch]))


def save(checkpoints: Checkpoints, *epochs: int, record: TrialRecord = TRIAL) -> None:
    for epoch in epochs:
        saved = checkpoint(epoch, record.number)
        checkpoints.save(record, saved.row, saved.state)


def written(folder: RunFolder, record: TrialRecord, epoch: int = 3) -> bytes:
    """What a run in which only this was saved has on disk."""
    save(Checkpoints(folder), epoch, record=record)
    return (folder.checkpoints / f"{record.number:05d}.state").read_bytes()


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
    newest, before = (folder.checkpoints / name for name in ("00007.state", "00007.before.state"))
    for checkpoints in (saved, Checkpoints(folder)):
        assert checkpoints.load(TRIAL) == checkpoint(3)
    assert names(folder) == [before.name, newest.name]
    assert saved.load(replace(TRIAL, number=8)) is None
    newest.rename(folder.path / "moved")
    assert saved.load(TRIAL) == checkpoint(2)
    before.rename(newest)
    (folder.path / "moved").rename(before)
    assert saved.load(TRIAL) == checkpoint(3)


def test_a_state_damaged_anywhere_falls_back_to_the_one_before(
    folder: RunFolder, saved: Checkpoints
) -> None:
    newest = folder.checkpoints / "00007.state"
    sound = newest.read_bytes()
    header = sound.index(b"\n") + 1
    places = [*range(header), *range(header, len(sound), 97), len(sound) - 1]
    flipped = (sound[:i] + bytes([sound[i] ^ 1 << i % 8]) + sound[i + 1 :] for i in places)
    cut_short = (sound[:length] for length in (*range(0, header, 9), header, 5000, -1))
    for damaged in (*NO_CHECKPOINTS, *flipped, *cut_short, sound + b"\n", sound[header:]):
        newest.write_bytes(damaged)
        assert saved.load(TRIAL) == checkpoint(2), damaged[:900]
    save(saved, 3)  # the epoch again, and on
    assert saved.load(TRIAL) == checkpoint(3)


@pytest.mark.parametrize(
    "other",
    [{"number": 8}, {"config": TrainConfig(lr=0.03)}, {"seed": 1}],
    ids=["trial", "configuration", "seed"],
)
def test_a_state_of_another_run_or_trial_is_passed_over(
    tmp_path: Path, folder: RunFolder, saved: Checkpoints, other: dict[str, Any]
) -> None:
    strange = written(RunFolder.create(tmp_path / "other"), replace(TRIAL, **other))
    (folder.checkpoints / "00007.state").write_bytes(strange)
    assert saved.load(TRIAL) == checkpoint(2)
    (folder.checkpoints / "00007.before.state").write_bytes(strange)
    assert saved.load(TRIAL) is None


def in_earlier_form(content: bytes, state: bytes | None = None) -> bytes:
    """Return a checkpoint as it was written before the forms had numbers."""
    header, _, now = content.partition(b"\n")
    state = now if state is None else state
    facts = {"row": json.loads(header)["row"], "size": len(state), "crc32": zlib.crc32(state)}
    return json.dumps(facts).encode() + b"\n" + state


def test_a_state_of_another_form_is_refused_and_kept(
    folder: RunFolder, saved: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = folder.checkpoints / "00007.state"
    sound = newest.read_bytes()
    newest.write_bytes(in_earlier_form(sound))
    assert saved.load(TRIAL) == checkpoint(3)
    newest.write_bytes(in_earlier_form(sound, b"state, param_groups"))
    with pytest.raises(RunFolderError, match=r"00007\.state .* \(its form is 1, here it is 2\)"):
        saved.check([replace(TRIAL, number=8), TRIAL])
    newest.write_bytes(sound)
    monkeypatch.setattr("tune_mnist.runs.checkpoints.FORM", 3)
    with pytest.raises(RunFolderError, match="its form is 2, here it is 3"):
        saved.check([TRIAL])
    assert newest.read_bytes() == sound


def test_states_ahead_of_the_rows_or_not_sound_are_passed_over(
    folder: RunFolder, saved: Checkpoints
) -> None:
    assert saved.load(TRIAL, up_to=3) == checkpoint(3)
    assert saved.load(TRIAL, up_to=2) == checkpoint(2)
    assert saved.load(TRIAL, up_to=1) is None
    for name in names(folder):
        (folder.checkpoints / name).write_bytes(b"")
    assert saved.load(TRIAL) is None


def test_what_is_no_plain_file_is_passed_over_at_once(
    folder: RunFolder, saved: Checkpoints, tmp_path: Path
) -> None:
    newest = folder.checkpoints / "00007.state"
    newest.rename(tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "elsewhere")
    assert saved.load(TRIAL) == checkpoint(2)
    newest.unlink()
    os.mkfifo(newest)  # opened as a file, it would be waited for
    assert saved.load(TRIAL) == checkpoint(2)


def test_a_diverged_epochs_row_is_read_as_it_was_written(folder: RunFolder) -> None:
    row = replace(checkpoint(1).row, val_loss=math.nan, train_loss=math.inf, diverged_step=33)
    checkpoints = Checkpoints(folder)
    checkpoints.save(TRIAL, row, b"")
    loaded = checkpoints.load(TRIAL)
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
            checkpoints.save(TRIAL, checkpoint(3).row, b"x" * 60_000)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save_best(b"x" * 60_000)
        assert checkpoints.load(TRIAL) == checkpoint(2)
        assert checkpoints.load(TRIAL, up_to=1) == checkpoint(1)
        assert folder.best_model.read_bytes() == b"best"
        assert names(folder) == ["00007.before.state", "00007.state"]


def test_only_unfinished_trials_leave_states(folder: RunFolder, saved: Checkpoints) -> None:
    for number in (8, 100_000):
        save(saved, 1, 2, record=replace(TRIAL, number=number))
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
from test_checkpoints import TRIAL
from tune_mnist.runs.checkpoints import Checkpoints
from tune_mnist.runs.folder import RunFolder
checkpoints, told = Checkpoints(RunFolder(Path(sys.argv[1]))), os.open(sys.argv[2], os.O_WRONLY)
for epoch in range(1, 10**9):
    checkpoints.save(TRIAL, epoch_row(7, epoch, 0.25), b"%09d" % epoch * 30_000)
    os.pwrite(told, b"%09d" % epoch, 0)
    if epoch == 1: print(flush=True)
"""
    told = folder.path / "told"
    told.touch()
    for attempt in range(3):
        with running(code, folder.path, told):
            time.sleep(0.03 + 0.011 * attempt)
        loaded = Checkpoints(folder).load(TRIAL)
        assert loaded is not None
        epoch = loaded.row.epoch
        assert loaded.state == b"%09d" % epoch * 30_000
        assert int(told.read_text()) - 1 <= epoch <= int(told.read_text()) + 1
