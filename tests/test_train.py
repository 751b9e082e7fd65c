import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.processes import python

from tune_mnist.cli import exit_code
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.net import Net
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History, TrialRecord
from tune_mnist.train import (
    TrainSettings,
    chosen,
    describe,
    train_by,
)

# Says after the command whether it brought in Ray, which takes seconds to start.
LAUNCH = """
import runpy, sys
try:
    runpy.run_module("tune_mnist.train", run_name="__main__", alter_sys=True)
finally:
    print("ray imported:", "ray" in sys.modules)
"""

pytestmark = pytest.mark.usefixtures("mnist")  # fetched once, and not by each command


def command(*arguments: str) -> list[str]:
    return ["-c", LAUNCH, *arguments, "--threads", "1", "--device", "cpu"]


@pytest.mark.slow
def test_the_command_prints_the_layers_then_each_epoch_and_keeps_the_weights(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.pt"
    arguments = ["--images", "300", "--epochs", "2", "--set", "lr=2e-2", "--save", str(path)]
    done = python(*command(*arguments, "--set", "batch_size=50"))
    assert (done.returncode, done.stderr) == (0, "")
    head, configuration, tail = re.split(r"^(Configuration: .*)\n", done.stdout, flags=re.M)
    assert "Linear-35" in head
    assert "Total params: 26,314" in head
    assert configuration == "Configuration: baseline with lr=0.02 batch_size=50"

    lines = tail.splitlines()
    bar = r"Loss=\d\.\d{4} batch_id=5: 100%\|#+\| 6/6 \[\d\d:\d\d<00:00, +\d+\.\d+(it/s|s/it)\]"
    tests = []
    for epoch in (1, 2):
        title, progress, test, *lines = lines
        assert title == f"Epoch : {epoch}"
        assert re.fullmatch(bar, progress)
        assert re.fullmatch(
            r"Test set: Average loss: \d\.\d{4}, Accuracy: \d+/10000 \(\d+\.\d\d%\)", test
        )
        tests.append(int(test.split()[6].split("/")[0]))
    assert lines[0].startswith(f"Last test accuracy: {tests[1] / 10_000:.2%}, after epoch 2. ")
    best = 1 + tests.index(max(tests))
    assert f"Best: {max(tests) / 10_000:.2%}, after epoch {best}, an epoch picked" in lines[0]
    assert "test set" in lines[0]
    assert lines[1:] == ["ray imported: False"]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout)

    saved = torch.load(path, weights_only=True)
    assert saved["config"] == TrainConfig(lr=0.02, batch_size=50).as_dict()
    assert (saved["epoch"], saved["epochs"], saved["seed"], saved["images"]) == (2, 2, 0, 300)
    Net().load_state_dict(saved["weights"])
    assert round(saved["test_accuracy"] * 10_000) == tests[1]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_on_a_terminal_a_bar_moves_and_ctrl_c_ends_in_one_line() -> None:
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [sys.executable, *command("--images", "600", "--set", "batch_size=20")],
        stdout=end,
        stderr=subprocess.PIPE,
        env=os.environ | {"COLUMNS": "120"},
        text=True,
    ) as process:
        os.close(end)
        seen = ""
        while "Epoch : 2" not in seen:
            seen += os.read(terminal, 10_000).decode()
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # its end is an error on a terminal
            while os.read(terminal, 10_000):
                pass
        _, err = process.communicate()
    os.close(terminal)
    assert re.fullmatch(
        r"interrupted in epoch 2\. Last test accuracy: .*, after epoch 1\..*\n", err
    )
    assert process.returncode == 130
    bars = re.findall(r"\r(Loss=\d\.\d+ batch_id=(\d+): .*?)(?=[\r\n])", seen)
    assert len(bars) > 2
    assert {"29"} < {batch for _, batch in bars}
    assert "30/30 [00:" in bars[-1][0]


def run(*arguments: str) -> int:
    device = () if "--device" in arguments else ("--device", "cpu")
    return exit_code("train", TrainSettings, train_by, [*arguments, *device])


def test_divergence_is_one_line_and_saves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt"
    hopeless = ["--set", "lr=10", "--set", "momentum=0.99", "--set", "batch_size=4"]
    assert run("--images", "300", "--save", str(path), *hopeless) == 1
    out, err = capfd.readouterr()
    assert re.fullmatch(r"error: training diverged in epoch \d at step \d+: .*\n", err)
    assert "Epoch : 1\nLoss=" in out
    assert not path.exists()


HAS_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "lr"], "--set: must be NAME=VALUE"),
        (["--set", "lr=-1"], "--set: lr: must be > 0"),
        (["--config", "none.yaml"], "none.yaml: cannot be read: No such file"),
        (["--epochs", "0"], "--epochs must be at least 1, but got 0"),
        (["--seed", "-1"], "--seed must be at least 0, but got -1"),
        (["--threads", "0"], "--threads must be at least 1, but got 0"),
        (["--images", "60001"], "images must be from 1 to 60,000"),
        (["--save", "none/model.pt"], "--save none/model.pt: cannot be written"),
        (["--save", "."], "--save .: is a folder"),
        (["--epoch", "3"], "Did you mean --epochs?"),
        (["--run", "mine"], "--run and --trial go together"),
        (["--trial", "0"], "--run and --trial go together"),
        (["--run", "mine", "--trial", "5"], "trials of mine are numbered from 0, but got 5"),
        (["--run", "minx", "--trial", "0"], "does not exist (did you mean 'mine'?)"),
        pytest.param(["--device", "cuda"], "torch finds no GPU", marks=HAS_GPU),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_before_training(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    RunFolder.create(tmp_path / "mine").write_search({})
    before = sorted(tmp_path.rglob("*"))
    assert run(*arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_baseline_is_trained_unless_told_otherwise(tmp_path: Path) -> None:
    assert chosen(TrainSettings()) == (TrainConfig(), 20)
    assert describe(TrainConfig()) == "Configuration: baseline"
    path = tmp_path / "mine.yaml"
    path.write_text("lr: 0.3\ndropout: 0.2\n")
    settings = TrainSettings(config=path, overrides=("lr=1e-3",))
    assert chosen(settings) == (TrainConfig(lr=1e-3, dropout=0.2), 20)


def test_a_trial_of_a_search_is_retrained_by_its_number(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "mine")
    folder.write_search({"asked": {"metric": "val_accuracy", "epochs": 7}})
    history = History(folder)
    history.open_session({})
    found = TrainConfig(lr=0.123456789012345678, schedule="cosine")
    history.start_trial(TrialRecord(0, found, seed=1, origin="sampled"), elapsed=0.0)
    settings = TrainSettings(run=folder.path, trial=0)
    assert chosen(settings) == (found, 7)
    assert chosen(replace(settings, epochs=3)) == (found, 3)
