import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tune_mnist
from tune_mnist.cli import exit_code
from tune_mnist.errors import ConfigError
from tune_mnist.mnist.checkpoint import load_model, pack_model
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Mnist
from tune_mnist.mnist.net import Net
from tune_mnist.predict import PredictSettings, predict


def _net() -> Net:
    torch.manual_seed(3)
    return Net()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with the model of an untrained net."""
    weights = io.BytesIO()
    torch.save(_net().state_dict(), weights)
    folder = tmp_path / "run"
    folder.mkdir()
    content = pack_model(TrainConfig(lr=0.02), weights.getvalue(), trial=3, test_accuracy=0.1)
    (folder / "best.pt").write_bytes(content)
    return folder


def test_a_run_gives_its_net_ready_for_inference(run: Path) -> None:
    images = torch.rand(5, 1, 28, 28)
    for net in (tune_mnist.load(run), tune_mnist.load(str(run / "best.pt"))):
        assert not net.training
        assert torch.equal(net(images), _net().eval()(images))
    model = load_model(run / "best.pt", Path.read_bytes)
    assert model.config == TrainConfig(lr=0.02)
    assert model.facts == {"trial": 3, "test_accuracy": 0.1}


@pytest.mark.parametrize(
    "content", [None, b"", b"no model", b"PK\x03\x04 nor this", print, os.mkfifo, "a link"]
)
def test_what_is_no_model_or_would_run_code_is_refused_in_a_line(run: Path, content: Any) -> None:
    if content is None:
        (run / "best.pt").unlink()
    elif content in (os.mkfifo, "a link"):
        kept = (run / "best.pt").rename(run / "kept.pt")
        os.mkfifo(run / "best.pt") if content is os.mkfifo else (run / "best.pt").symlink_to(kept)
    elif content is print:
        torch.save({"weights": print, "config": {}}, run / "best.pt")
    else:
        (run / "best.pt").write_bytes(content)
    words = "holds no model of this net" if content is print else "best.pt"
    with pytest.raises(ConfigError, match=rf"^.*{words}.*\Z"):
        tune_mnist.load(run)


def test_the_command_reads_what_it_can_and_says_what_it_cannot(
    run: Path, mnist: Mnist, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, text = tmp_path / "two.png", tmp_path / "text.png"
    Image.fromarray(255 - mnist.test_images[1]).resize((99, 120)).save(picture)
    text.write_text("no image")
    arguments = [str(run), str(text), str(picture), "--show"]
    assert exit_code("predict", PredictSettings, predict, arguments) == 2
    said, error = capsys.readouterr()
    first, *drawing = said.splitlines()
    assert re.fullmatch(rf"{picture}: \d \(\d+\.\d%\), or else \d \(\d+\.\d%\)", first)
    assert len(drawing) == 28
    assert "@" in said
    assert error == f"error: {text} is no image that can be read\n"


@pytest.mark.parametrize("arguments", [[], ["results/x"]])
def test_without_a_run_or_images_it_says_what_to_name(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("predict", PredictSettings, predict, arguments) == 2
    assert "name a run's folder and one or more image files" in capsys.readouterr().err
