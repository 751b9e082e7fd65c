from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.net import Net

Row = tuple[str, tuple[int, ...], int]


def block(channels: int, side: int, convolution_parameters: int) -> list[Row]:
    shape = (channels, side, side)
    return [
        ("Conv2d", shape, convolution_parameters),
        ("ReLU", shape, 0),
        ("BatchNorm2d", shape, 2 * channels),
        ("Dropout", shape, 0),
    ]


ROWS: list[Row] = [
    *block(8, 26, 80),
    *block(16, 24, 1168),
    *block(32, 22, 4640),
    *block(8, 22, 264),
    *block(16, 20, 1168),
    *block(32, 18, 4640),
    ("MaxPool2d", (32, 9, 9), 0),
    *block(8, 9, 264),
    *block(16, 7, 1168),
    ("Conv2d", (32, 5, 5), 4640),
    ("Linear", (10,), 8010),
]


def layer_rows(net: nn.Module, images: Tensor) -> list[Row]:
    """Type, output shape and parameter count of every leaf layer, in the order they run."""
    rows: list[Row] = []

    def note(layer: nn.Module, _: Any, output: Tensor) -> None:
        count = sum(parameter.numel() for parameter in layer.parameters())
        rows.append((type(layer).__name__, tuple(output.shape[1:]), count))

    for layer in net.modules():
        if not list(layer.children()):
            layer.register_forward_hook(note)
    net(images)
    return rows


def test_the_net_has_exactly_these_35_layers() -> None:
    rows = layer_rows(Net(), torch.rand(2, 1, 28, 28))
    assert len(ROWS) == 35
    assert rows == ROWS


def test_all_26314_parameters_are_trainable() -> None:
    parameters = list(Net().parameters())
    assert sum(parameter.numel() for parameter in parameters) == 26_314
    assert all(parameter.requires_grad for parameter in parameters)


def test_layers_are_plain() -> None:
    for layer in Net(dropout=0.25).modules():
        match layer:
            case nn.Conv2d():
                assert (layer.stride, layer.padding, layer.dilation) == ((1, 1), (0, 0), (1, 1))
            case nn.MaxPool2d():
                assert (layer.kernel_size, layer.stride) == (2, 2)
            case nn.BatchNorm2d():
                assert (layer.eps, layer.momentum) == (1e-5, 0.1)
            case nn.Dropout():
                assert layer.p == 0.25


def test_output_is_log_probabilities() -> None:
    log_probabilities = Net()(torch.rand(5, 1, 28, 28))
    assert log_probabilities.shape == (5, 10)
    torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(5))


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_impossible_dropout_is_refused(dropout: float) -> None:
    with pytest.raises(ConfigError, match="0 <= dropout < 1"):
        Net(dropout=dropout)
