"""What a run holds between two steps, in the form in which it is saved, and back.

A state is the same whatever computes it: `net`, a state_dict; `optimizer`, its memory by torch's
names and then by those of the weights; `average`, the averaged net and its age, or None.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.epoch import draw_net
from tune_mnist.mnist.optim import FlatNet, FlatOptimizer, flat

State = dict[str, Any]


class Moving(Protocol):
    """What the steps of a run move."""

    net: FlatNet
    average: FlatNet  # of a run without one whatever
    optimizer: FlatOptimizer


def initial_state(config: TrainConfig, seed: int) -> State:
    """Return the state of a run before its first epoch."""
    net = draw_net(config, seed).state_dict()
    average = {"net": net, "steps": 0} if config.ema_decay else None
    return {"net": net, "optimizer": {}, "average": average}


def put_state(state: State, moving: Moving) -> None:
    """Copy a state into the vectors of what moves.

    Raises:
        ConfigError: it has the optimizer's memory in another form, as earlier versions wrote it.
    """
    memory, buffers = state["optimizer"], moving.optimizer.buffers
    if memory and memory.keys() != buffers.keys():  # it is empty before the first step
        raise ConfigError(
            "the saved state was written by another version of tune_mnist: go on with that "
            "version, or start the run anew"
        )
    moving.net.copy_from(state["net"])
    average = state["average"]
    moving.average.copy_from(state["net"] if average is None else average["net"])
    for name, buffer in buffers.items():
        buffer.zero_()
        if memory:
            buffer.copy_(flat(memory[name].values()))


def vectors_of(moving: Moving) -> list[Tensor]:
    """Return the vectors that `state_of` makes a state of."""
    return [moving.net.vector, moving.average.vector, *moving.optimizer.buffers.values()]


def state_of(
    moving: Moving, vectors: Sequence[Tensor], config: TrainConfig, batches: int
) -> State:
    """Make a state of copies of the vectors, on the CPU, after so many batches of the run."""
    net, average, *memory = vectors
    averaged = {"net": moving.net.state_dict(average, batches), "steps": batches}
    return {
        "net": moving.net.state_dict(net, batches),
        "optimizer": {
            name: moving.net.named(vector)
            for name, vector in zip(moving.optimizer.buffers, memory, strict=True)
        },
        "average": averaged if config.ema_decay else None,
    }
