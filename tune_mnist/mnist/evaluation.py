"""How good a net is on labelled images."""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from tune_mnist.mnist.fused import evaluation_forward
from tune_mnist.mnist.images import normalised, scaled
from tune_mnist.mnist.net import Net

EVALUATION_BATCH = 1000  # images turned from bytes to floats at a time on a CPU: 3 MB


@dataclass(frozen=True)
class Score:
    """What evaluating on some images came to; without images NaN."""

    images: int = 0
    correct: int = 0
    loss: float = math.nan  # mean negative log-likelihood of an image's label

    @classmethod
    def of(cls, images: int, tally: Tensor) -> Self:
        """Read a `tally` over so many images."""
        if not images:
            return cls()
        correct, loss = tally.tolist()
        return cls(images, int(correct), loss)

    @property
    def accuracy(self) -> float:
        """The fraction of the images that is classified correctly."""
        return self.correct / self.images if self.images else math.nan

    @property
    def lost(self) -> bool:
        """Say whether there were images, and the net has no finite answer for them."""
        return self.images > 0 and not math.isfinite(self.loss)


def evaluate(net: Net, images: Tensor, labels: Tensor) -> Score:
    """Score a net, which is left in evaluation mode, on images uint8 [N, 28, 28], labels [N]."""
    return Score.of(len(labels), tally(net, images, labels))


def tally(net: Net, images: Tensor, labels: Tensor) -> Tensor:
    """Do what `evaluate` does, and leave correct and loss on the device, float32 [2]."""
    if not len(labels):
        return torch.full((2,), math.nan, device=labels.device)
    net.eval()
    size = EVALUATION_BATCH if images.device.type == "cpu" else len(images)
    log_probs = torch.cat(
        [evaluation_forward(net, normalised(scaled(batch))) for batch in torch.split(images, size)]
    )
    loss = F.nll_loss(log_probs, labels)
    correct = (log_probs.argmax(1) == labels).sum()
    return torch.stack((correct.to(loss.dtype), loss))
