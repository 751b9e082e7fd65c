"""The file that keeps a trained net: its weights and where they come from."""

from io import BytesIO

import torch

from tune_mnist.mnist.config import TrainConfig, Value
from tune_mnist.mnist.training import load_weights


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
