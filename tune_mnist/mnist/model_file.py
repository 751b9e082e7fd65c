"""The file that keeps a trained net: its weights and where they come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.config import TrainConfig, Value
from tune_mnist.mnist.net import Net
from tune_mnist.mnist.training import load_weights


@dataclass(frozen=True)
class SavedModel:
    """A trained net and where it comes from."""

    net: Net  # ready for inference, on the CPU
    config: TrainConfig
    facts: Mapping[str, Value | None]


def pack_model(config: TrainConfig, weights: bytes, **facts: Value | None) -> bytes:
    """Return the content of a file that `torch.load(path, weights_only=True)` reads.

    It holds a dictionary with `config` (hyperparameters by name), `weights` (a state_dict of
    `Net`) and the facts.

    Args:
        config: what the net was trained with.
        weights: of an EpochResult.
        facts: what else there is to say about the net.
    """
    buffer = BytesIO()
    state = load_weights(weights).state_dict()
    torch.save({"config": config.as_dict(), "weights": state, **facts}, buffer)
    return buffer.getvalue()


def load_model(path: Path) -> SavedModel:
    """Read a file that `pack_model` made; nothing in it is ever executed.

    Raises:
        ConfigError: there is no such file, or it is none of those.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        net = Net()
        net.load_state_dict(content.pop("weights"))
        config = TrainConfig.from_mapping(content.pop("config"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: no model was kept there") from None
    except Exception as error:  # torch has a dozen ways to say that a file is not its own
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(f"{path} holds no model of this net ({what})") from error
    return SavedModel(net.eval(), config, content)
