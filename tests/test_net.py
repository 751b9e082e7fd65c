import re

import torch
from torch import nn

from tune_mnist.mnist.net import Net, layer_table

Row = tuple[str, list[int], int]


def block(channels: int, side: int, convolution_parameters: int) -> list[Row]:
    shape = [channels, side, side]
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
    ("MaxPool2d", [32, 9, 9], 0),
    *block(8, 9, 264),
    *block(16, 7, 1168),
    ("Conv2d", [32, 5, 5], 4640),
    ("Linear", [10], 8010),
]


def test_the_table_shows_exactly_these_35_layers_and_their_totals() -> None:
    table = layer_table()
    lines = re.findall(r"^(\w+)-(\d+) +\[(.+?)\] +([\d,]+)$", table, re.MULTILINE)
    assert [int(number) for _, number, *_ in lines] == list(range(1, 36))
    assert [
        (kind, [int(side) for side in shape.split(",")], int(count.replace(",", "")))
        for kind, _, shape, count in lines
    ] == ROWS
    outputs = sum(torch.Size(shape).numel() for _, shape, _ in ROWS)
    for line in (
        "Total params: 26,314",
        "Trainable params: 26,314",
        "Non-trainable params: 0",
        f"Input size (MB): {28 * 28 * 4 / 2**20:.3f}",
        f"Forward/backward pass size (MB): {2 * outputs * 4 / 2**20:.3f}",
        f"Params size (MB): {26_314 * 4 / 2**20:.3f}",
    ):
        assert line in table


def test_drawing_the_table_draws_no_random_numbers() -> None:
    random_state = torch.get_rng_state()
    layer_table()
    assert torch.equal(torch.get_rng_state(), random_state)


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
