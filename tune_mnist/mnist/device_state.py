"""What a DeviceStep holds, in the form in which a run on a CPU saves it, and back."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.device_step import DeviceStep
from tune_mnist.mnist.epoch import draw_net
from tune_mnist.mnist.flat_net import flat
from tune_mnist.mnist.optim import Average, build_optimizer

State = dict[str, Any]


def initial_state(config: TrainConfig, seed: int) -> State:
    """Return the state of a run before its first epoch."""
    net = draw_net(config, seed)
    average = Average(net, config.ema_decay) if config.ema_decay else None
    return {
        "net": net.state_dict(),
        "optimizer": build_optimizer(net, config).state_dict(),
        "average": None if average is None else average.state_dict(),
    }


def put_state(state: State, step: DeviceStep) -> None:
    """Copy a state into a step's buffers."""
    step.net.copy_from(state["net"])
    average = state["average"]
    step.average.copy_from(state["net"] if average is None else average["net"])
    memory = state["optimizer"]["state"]  # by the number of a weight; none before the first step
    for name, buffer in step.optimizer.buffers.items():
        buffer.zero_()
        parts = [memory[number][name] for number in sorted(memory) if name in memory[number]]
        if parts:
            buffer.copy_(flat(parts))


def vectors_of(step: DeviceStep) -> list[Tensor]:
    """Return the buffers that `state_of` makes a state of."""
    return [step.net.vector, step.average.vector, *step.optimizer.buffers.values()]


def state_of(
    step: DeviceStep, vectors: Sequence[Tensor], config: TrainConfig, batches: int
) -> State:
    """Make a state of copies of the buffers, on the CPU, after so many batches of the run."""
    net, average, *memory = vectors
    optimizer = build_optimizer(step.net.net, config).state_dict()
    parts = [step.net.named(vector).values() for vector in memory]
    taken = {} if config.optimizer == "sgd" else {"step": torch.tensor(float(batches))}
    optimizer["state"] = {
        number: taken | dict(zip(step.optimizer.buffers, of_weight, strict=True))
        for number, of_weight in enumerate(zip(*parts, strict=True))
    }
    averaged = {"net": step.net.state_dict(average, batches), "steps": batches}
    return {
        "net": step.net.state_dict(net, batches),
        "optimizer": optimizer,
        "average": averaged if config.ema_decay else None,
    }
