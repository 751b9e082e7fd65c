import torch

from tune_mnist.mnist.net import Net, layer_table


def test_the_table_has_a_row_for_each_of_the_35_layers() -> None:
    lines = layer_table(Net()).splitlines()
    rows = [line.split() for line in lines if "-" in line and "[" in line]
    assert len(rows) == 35
    assert rows[0] == ["Conv2d-1", "[8,", "26,", "26]", "80"]
    assert rows[24] == ["MaxPool2d-25", "[32,", "9,", "9]", "0"]
    assert rows[34] == ["Linear-35", "[10]", "8,010"]


def test_the_totals_are_those_of_one_image_in_float32() -> None:
    table = layer_table(Net())
    outputs = (
        4 * (8 * 26**2 + 16 * 24**2 + 32 * 22**2 + 8 * 22**2 + 16 * 20**2 + 32 * 18**2)
        + 32 * 9**2
        + 4 * (8 * 9**2 + 16 * 7**2)
        + 32 * 5**2
        + 10
    )
    for line in (
        "Total params: 26,314",
        "Trainable params: 26,314",
        "Non-trainable params: 0",
        f"Input size (MB): {28 * 28 * 4 / 2**20:.3f}",
        f"Forward/backward pass size (MB): {2 * outputs * 4 / 2**20:.3f}",
        f"Params size (MB): {26_314 * 4 / 2**20:.3f}",
    ):
        assert line in table


def test_frozen_parameters_are_not_counted_as_trainable() -> None:
    net = Net()
    net.classifier.requires_grad_(False)
    table = layer_table(net)
    assert "Trainable params: 18,304" in table
    assert "Non-trainable params: 8,010" in table


def test_drawing_the_table_changes_nothing() -> None:
    net = Net()
    random_state = torch.get_rng_state()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    layer_table(net)
    assert net.training
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
