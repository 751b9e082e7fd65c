from pathlib import Path

import pytest

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.config import TrainConfig, override, read_config


def test_a_file_names_only_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optimizer: adamw  # better?\nlr: 1.0e-3\nbatch_size: 64\n")
    assert read_config(path) == TrainConfig(optimizer="adamw", lr=1e-3, batch_size=64)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"lr: [", "is not YAML"),
        (b"\xff\xfe\xff", "is not YAML"),
        (b"", "must hold hyperparameters"),
        (b"- lr", "must hold hyperparameters"),
        (b"momentun: 0.5", "did you mean 'momentum'?"),
        (b"3: 4", "unknown hyperparameter '3'"),
        (b"lr: -1", "lr: must be > 0"),
        (b"lr: 1e-4", "lr: must be a number, but got '1e-4' (text"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path: Path, content: bytes, rule: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert rule in str(caught.value)


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_config(tmp_path)


def test_texts_go_over_a_configuration_the_last_one_winning() -> None:
    config = TrainConfig(lr=0.5, dropout=0.3)
    texts = ["lr=1e-4", "nesterov=true", "optimizer=adamw", "batch_size=64", "lr=2e-4"]
    assert override(config, texts) == TrainConfig(
        lr=2e-4, dropout=0.3, nesterov=True, optimizer="adamw", batch_size=64
    )
    assert override(config, []) == config


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("lr", "must be NAME=VALUE"),
        ("lr 0.1", "must be NAME=VALUE"),
        ("lrr=0.1", "did you mean 'lr'?"),
        ("lr=", "lr: must be a number, but got None"),
        ("lr=fast", "lr: must be a number, but got 'fast'"),
        ("lr=nan", "lr: must be > 0"),
        ("lr=[", "lr: must be a number"),
        ("batch_size=2.5", "batch_size: must be a whole number"),
        ("optimizer=sdg", "did you mean 'sgd'?"),
        ("nesterov=maybe", "nesterov: must be one of true, false"),
    ],
)
def test_a_bad_text_is_an_error(text: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(TrainConfig(), [text])
    assert rule in str(caught.value)


def test_what_belongs_together_is_checked_together() -> None:
    config = override(TrainConfig(), ["momentum=0", "nesterov=false"])
    with pytest.raises(ConfigError, match="needs momentum > 0"):
        override(config, ["nesterov=true"])
    assert override(config, ["nesterov=true", "momentum=0.9"]).nesterov
