"""What is kept of a run and of its net: the state to resume from, the weights, `best.pt`.

A state is the same whatever computes it: `net`, a state_dict; `optimizer`, its memory by torch's
names and then by those of the weights; `average`, the averaged net and its age, or None.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune_mnist.errors import ConfigError, StateError, named
from tune_mnist.mnist.config import TrainConfig, Value
from tune_mnist.mnist.net import Net
from tune_mnist.mnist.step import Step, flat

State = dict[str, Any]


def initial_state(net: Net, config: TrainConfig) -> State:
    weights = net.state_dict()
    average = {"net": weights, "steps": 0} if config.ema_decay else None
    return {"net": weights, "optimizer": {}, "average": average}


def put_state(state: State, step: Step) -> None:
    """Copy a state into a step, or raise StateError if an earlier version wrote the state."""
    memory, buffers = state["optimizer"], step.optimizer.buffers
    if memory and memory.keys() != buffers.keys():  # it is empty before the first step
        raise StateError(
            "the saved state was written by another version of tune_mnist: resume with that "
            "version, or start the run anew"
        )
    average = state["average"]
    step.net.copy_from(state["net"])
    step.average.copy_from(state["net"] if average is None else average["net"])
    for name, buffer in buffers.items():
        buffer.zero_()
        if memory:
            buffer.copy_(flat(memory[name].values()))


def state_of(step: Step, vectors: Sequence[Tensor], config: TrainConfig, batches: int) -> State:
    """Make a state of copies of `step.vectors`, on the CPU, after so many batches of the run."""
    net, average, *memory = vectors
    averaged = {"net": step.net.state_dict(average, batches), "steps": batches}
    return {
        "net": step.net.state_dict(net, batches),
        "optimizer": {
            name: step.net.named(vector)
            for name, vector in zip(step.optimizer.buffers, memory, strict=True)
        },
        "average": averaged if config.ema_decay else None,
    }


def evaluated_weights(state: State) -> dict[str, Tensor]:
    """Return the state_dict of the net that is evaluated: the average where there is one."""
    weights: dict[str, Tensor] = (state["average"] or state)["net"]
    return weights


def pack(value: Any) -> bytes:
    """Return what `torch.load(..., weights_only=True)` reads."""
    buffer = BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpack(packed: bytes) -> Any:
    """Read what `pack` made, executing nothing, or raise StateError if it is damaged."""
    try:
        return torch.load(BytesIO(packed), map_location="cpu", weights_only=True)
    except Exception as error:  # torch has a dozen ways to say that bytes are not its own
        raise StateError("the saved state is damaged") from error


def load_weights(weights: bytes) -> Net:
    """Build the net from an EpochResult's `weights`, ready for inference."""
    net = Net()
    net.load_state_dict(unpack(weights))
    return net.eval()


def raw_weights(state: bytes) -> bytes:
    """Return the weights as the last step left them, of an EpochResult's `state`."""
    return pack(unpack(state)["net"])


@dataclass(frozen=True)
class SavedModel:
    """A trained net and where it comes from."""

    net: Net  # ready for inference, on the CPU
    config: TrainConfig
    facts: Mapping[str, Value | None]


def pack_model(config: TrainConfig, weights: bytes, **facts: Value | None) -> bytes:
    """Return the content of a file that `torch.load(path, weights_only=True)` reads.

    It holds a dictionary with `config` (hyperparameters by name), `weights` (a state_dict of
    `Net`) and the facts. `weights` are those of an EpochResult.
    """
    state = load_weights(weights).state_dict()
    return pack({"config": config.as_dict(), "weights": state, **facts})


def load_model(path: Path, read: Callable[[Path], bytes]) -> SavedModel:
    """Read a file that `pack_model` made, executing nothing, or raise ConfigError."""
    try:
        content = torch.load(BytesIO(read(path)), map_location="cpu", weights_only=True)
        net = Net()
        net.load_state_dict(content.pop("weights"))
        config = TrainConfig.from_mapping(content.pop("config"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: no model was kept there") from None
    except Exception as error:  # as in `unpack`
        raise ConfigError(f"{path} holds no model of this net ({named(error)})") from error
    return SavedModel(net.eval(), config, content)
