"""A net all of whose numbers lie in one vector, so that few large operations reach all of them."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tune_mnist.mnist.net import Net


class FlatNet:
    """A net on a device, its weights first and batch norm's statistics last in `vector`.

    Parts with four dimensions lie channels last. Batches seen by batch norm are not counted.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.device("meta"):  # draws no weights
            self.net = Net()
        for layer in self.net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.num_batches_tracked = None
        weights = {name: each.shape for name, each in self.net.named_parameters()}
        statistics = {name: each.shape for name, each in self.net.named_buffers()}
        self._shapes = weights | statistics
        self.vector = torch.zeros(_size(self._shapes), device=device)
        self.weights = self.vector[: _size(weights)]
        for name, part in self.named(self.vector).items():
            owner, _, attribute = name.rpartition(".")
            layer = self.net.get_submodule(owner)
            # `data` counts changes by itself: autograd need not mind that other parts of the
            # vector change between forward and backward.
            setattr(layer, attribute, nn.Parameter(part.data) if name in weights else part.data)
        self.parameters = list(self.net.parameters())

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """View a vector made like `vector` or `weights` by the names of a state_dict."""
        views, start = {}, 0
        for name, shape in self._shapes.items():
            if start == len(vector):
                break
            part = vector[start : start + math.prod(shape)]
            start += len(part)
            if len(shape) == 4:
                count, channels, height, width = shape
                views[name] = part.view(count, height, width, channels).permute(0, 3, 1, 2)
            else:
                views[name] = part.view(shape)
        return views

    def copy_from(self, state: Mapping[str, Tensor]) -> None:
        """Take over the numbers of a state_dict of `Net`."""
        for name, part in self.named(self.vector).items():
            part.copy_(state[name])

    def state_dict(self, vector: Tensor, batches: int) -> dict[str, Tensor]:
        """Give a vector made like `vector` the form of `Net`'s state_dict after some batches."""
        found = self.named(vector)
        norms = [name.removesuffix("running_mean") for name in found if "running_mean" in name]
        return found | {f"{name}num_batches_tracked": torch.tensor(batches) for name in norms}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Put tensors into one vector in the order that FlatNet's have there."""
    return torch.cat(
        [(each.permute(0, 2, 3, 1) if each.dim() == 4 else each).reshape(-1) for each in tensors]
    )


def _size(shapes: Mapping[str, torch.Size]) -> int:
    return sum(map(math.prod, shapes.values()))
