"""The network: nine convolutions and one linear layer, 26,314 parameters.

This is the readable form, made of torch's own modules; its `state_dict` is what is saved. Training
and evaluation compute the same in fewer passes over memory: see `forward`.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SHAPE = (1, 28, 28)
CLASSES = 10
NORMS = 8  # batch norms, each followed by dropout


class Net(nn.Module):
    """Map images float32 [B, 1, 28, 28] to log-probabilities [B, 10].

    A block is convolution, ReLU, batch norm, dropout; nothing is padded. Sides of the square maps:
    28 -> 26 24 22 22 20 18 -> pool 9 -> 9 7 5.
    """

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_layers((1, 8, 16, 32, 8, 16, 32), kernels=(3, 3, 3, 1, 3, 3), dropout=dropout),
            nn.MaxPool2d(2),
            *_layers((32, 8, 16), kernels=(1, 3), dropout=dropout),
            nn.Conv2d(16, 32, 3),
        )
        self.classifier = nn.Linear(32 * 5 * 5, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.features(images), 1))
        return F.log_softmax(logits, dim=1)


def _layers(channels: Sequence[int], kernels: Sequence[int], dropout: float) -> list[nn.Module]:
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


class Block(NamedTuple):
    """A convolution and what follows it before the next one."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d | None  # after ReLU and before dropout; None in the last block
    pooled: bool  # 2 x 2 max-pool at the end


def blocks(net: Net) -> Iterator[Block]:
    layers = list(net.features)
    starts = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    for start, end in pairwise([*starts, len(layers)]):
        norms = [layer for layer in layers[start:end] if isinstance(layer, nn.BatchNorm2d)]
        yield Block(
            convolution=cast(nn.Conv2d, layers[start]),
            norm=norms[0] if norms else None,
            pooled=isinstance(layers[end - 1], nn.MaxPool2d),
        )


def layer_table() -> str:
    """Draw the table of the net's layers, in the order they run; sizes are those of one image."""
    rows: list[tuple[str, Tensor, int]] = []

    def note(layer: nn.Module, _: Any, output: Tensor) -> None:
        rows.append((type(layer).__name__, output, _count(layer.parameters())))

    with torch.device("meta"):  # no weights are drawn
        net, images = Net().eval(), torch.zeros(1, *IMAGE_SHAPE)
    for layer in net.modules():
        if not list(layer.children()):
            layer.register_forward_hook(note)
    net(images)

    rule = "-" * 58
    total = _count(net.parameters())
    input_mb = _megabytes(images.numel())
    pass_mb = _megabytes(2 * sum(output.numel() for _, output, _ in rows))  # and its gradients
    parameters_mb = _megabytes(total)
    return "\n".join(
        [
            *(rule, f"{'Layer':<20}{'Output shape':<24}{'Parameters':>14}", rule),
            *(
                f"{f'{kind}-{number}':<20}{list(output.shape[1:])!s:<24}{count:>14,}"
                for number, (kind, output, count) in enumerate(rows, start=1)
            ),
            rule,
            f"Total params: {total:,}",
            f"Trainable params: {total:,}",
            "Non-trainable params: 0",
            rule,
            f"Input size (MB): {input_mb:.3f}",
            f"Forward/backward pass size (MB): {pass_mb:.3f}",
            f"Params size (MB): {parameters_mb:.3f}",
            f"Estimated total size (MB): {input_mb + pass_mb + parameters_mb:.3f}",
            rule,
        ]
    )


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(each.numel() for each in parameters)


def _megabytes(floats: int) -> float:
    return floats * 4 / 1024**2  # float32
