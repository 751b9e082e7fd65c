from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tune_mnist.benchmarks.textbook import build_optimizer
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.net import Net
from tune_mnist.mnist.optim import FLAT_OPTIMIZERS, FlatNet, flat

SGD = TrainConfig(lr=0.1)
ADAMW = TrainConfig(optimizer="adamw", lr=0.01)
STEPS = 40


@pytest.mark.parametrize(
    "config",
    [
        SGD,
        replace(SGD, momentum=0),
        replace(SGD, momentum=0.7, nesterov=True, weight_decay=0.05),
        replace(SGD, momentum=0, weight_decay=0.3),
        ADAMW,
        replace(ADAMW, beta1=0.5, beta2=0.9, weight_decay=0.5),
        replace(ADAMW, beta1=0, beta2=0),
    ],
)
def test_many_steps_equal_torchs(config: TrainConfig) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(30, 20)
    weights = layer.weight.detach().flatten().clone()
    ours, theirs = FLAT_OPTIMIZERS[config.optimizer](weights), build_optimizer(layer, config)
    rates = config.lr * np.linspace(0.1, 1, STEPS)
    # In two parts, as epochs are.
    halves = [ours.columns(config, rates[:15], 0), ours.columns(config, rates[15:], 15)]
    for step in range(STEPS):
        gradient = torch.randn(20, 30, generator=generator)
        layer.weight.grad, layer.bias.grad = gradient, torch.zeros(20)
        theirs.param_groups[0]["lr"] = rates[step]
        theirs.step()
        columns, row = (halves[0], step) if step < 15 else (halves[1], step - 15)
        numbers = {
            name: torch.tensor(np.broadcast_to(column, STEPS)[row], dtype=torch.float32)
            if np.ndim(column) == 0
            else torch.tensor(np.asarray(column)[row], dtype=torch.float32)
            for name, column in columns.items()
        }
        ours.update(gradient.flatten(), numbers)
    torch.testing.assert_close(weights.view(20, 30), layer.weight.detach(), rtol=1e-5, atol=1e-6)
    state = theirs.state[layer.weight]
    for name, buffer in ours.buffers.items():
        if name in state:
            torch.testing.assert_close(buffer.view(20, 30), state[name], rtol=1e-5, atol=1e-6)


def test_a_flat_net_is_the_net_whose_state_it_took() -> None:
    torch.manual_seed(3)
    net = Net(0.0).to(memory_format=torch.channels_last)
    images = torch.randn(6, 1, 28, 28)
    net.train()(images)  # batch norm's statistics are then its own
    found = FlatNet(torch.device("cpu"))
    found.copy_from(net.state_dict())
    assert torch.equal(found.net.eval()(images), net.eval()(images))
    state = found.state_dict(found.vector, batches=1)
    assert state.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.equal(state[name], value), name
    assert torch.equal(flat(net.parameters()), found.weights)


def test_a_flat_nets_vector_is_its_weights() -> None:
    found = FlatNet(torch.device("cpu"))
    found.vector.fill_(0.5)
    assert all((weight == 0.5).all() for weight in found.net.parameters())
    assert sum(weight.numel() for weight in found.net.parameters()) == len(found.weights) == 26_314
    found.weights[-1] = 2.0
    assert found.net.classifier.bias[-1] == 2.0
