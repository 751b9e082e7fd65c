"""The network: nine convolutions and one linear layer, 26,314 parameters.

This is the readable form, made of torch's own modules; its `state_dict` is what is saved. The
same mathematics in fewer passes over memory for training is in `fused.py`.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tune_mnist.errors import ConfigError

IMAGE_SHAPE = (1, 28, 28)
CLASSES = 10
NORMS = 8  # batch norms, each followed by dropout


def check_dropout(dropout: float) -> None:
    """Refuse a rate outside [0, 1), where survivors cannot be rescaled to keep the mean."""
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout: `0 <= dropout < 1` must hold, but got {dropout}")


class Net(nn.Module):
    """Map images float32 [B, 1, 28, 28] to log-probabilities [B, 10].

    A block is convolution, ReLU, batch norm, dropout; nothing is padded. Sides of the square maps:
    28 -> 26 24 22 22 20 18 -> pool 9 -> 9 7 5.
    """

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        check_dropout(dropout)
        self.features = nn.Sequential(
            *_blocks((1, 8, 16, 32, 8, 16, 32), kernels=(3, 3, 3, 1, 3, 3), dropout=dropout),
            nn.MaxPool2d(2),
            *_blocks((32, 8, 16), kernels=(1, 3), dropout=dropout),
            nn.Conv2d(16, 32, 3),
        )
        self.classifier = nn.Linear(32 * 5 * 5, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the log-probabilities of the ten classes."""
        logits: Tensor = self.classifier(torch.flatten(self.features(images), 1))
        return F.log_softmax(logits, dim=1)


def _blocks(channels: Sequence[int], kernels: Sequence[int], dropout: float) -> list[nn.Module]:
    """Chain one block per kernel through the given channel counts."""
    layers: list[nn.Module] = []
    for (inputs, outputs), kernel in zip(pairwise(channels), kernels, strict=True):
        layers += [
            nn.Conv2d(inputs, outputs, kernel),
            nn.ReLU(),
            nn.BatchNorm2d(outputs),
            nn.Dropout(dropout),
        ]
    return layers
