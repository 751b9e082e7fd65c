"""What a process keeps on a device from one run to the next, so that nothing is prepared twice."""

from threading import Lock
from typing import Any

import torch

from tune_mnist.mnist.data import Split
from tune_mnist.mnist.device_step import DeviceStep, StepKind
from tune_mnist.mnist.images import SplitTensors

_MOST_STEPS = 16  # kept prepared; a search of the default space has four kinds

_workspaces: dict[str, "Workspace"] = {}


class Workspace:
    """Images on a device and the steps that were prepared for them; one run at a time uses it."""

    def __init__(self, split: Split, device: str) -> None:
        self.data = SplitTensors.room_for(split, device)
        self.lock = Lock()
        self.mark: object = None  # of the run whose images and state lie here, in which step
        self._generator = torch.Generator(device)
        on_gpu = self.data.device.type == "cuda"
        self._pool: Any = torch.cuda.graph_pool_handle() if on_gpu else None
        self._steps: dict[StepKind, DeviceStep] = {}

    @classmethod
    def on(cls, device: str, split: Split) -> "Workspace":
        """Return the process's workspace on a device, a new one where the split does not fit."""
        kept = _workspaces.get(device)
        if kept is None or not kept.data.fits(split):
            _workspaces.pop(device, None)  # frees its memory first
            kept = _workspaces[device] = cls(split, device)
        return kept

    def step(self, kind: StepKind) -> DeviceStep:
        """Return a step of a kind, prepared where that was not done before."""
        step = self._steps.pop(kind, None)
        if step is None:
            if len(self._steps) == _MOST_STEPS:
                del self._steps[next(iter(self._steps))]  # the one not used for longest
            step = DeviceStep(kind, self.data, self._generator, self._pool)
        self._steps[kind] = step
        return step
