"""The net's layers as a table: type, output shape and parameters, with the totals below."""

from typing import Any

import torch
from torch import Tensor, nn

from tune_mnist.mnist.net import IMAGE_SHAPE, Net

_MEGABYTE = 1024**2


def layer_table(net: Net) -> str:
    """Draw the table of a net's layers, in the order they run; sizes are those of one image."""
    rows: list[tuple[str, Tensor, int]] = []

    def note(layer: nn.Module, _: Any, output: Tensor) -> None:
        rows.append((type(layer).__name__, output, _count(layer)))

    leaves = [layer for layer in net.modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(note) for layer in leaves]
    was_training = net.training
    images = torch.zeros(1, *IMAGE_SHAPE)
    with torch.inference_mode():
        net.eval()(images)  # batch norm's statistics and random numbers stay as they are
    net.train(was_training)
    for hook in hooks:
        hook.remove()

    rule = "-" * 58
    lines = [rule, f"{'Layer':<20}{'Output shape':<24}{'Parameters':>14}", rule]
    for number, (kind, output, count) in enumerate(rows, start=1):
        lines.append(f"{f'{kind}-{number}':<20}{list(output.shape[1:])!s:<24}{count:>14,}")
    total, trainable = _count(net), _count(net, only_trainable=True)
    input_mb = _megabytes(images.numel())
    pass_mb = _megabytes(2 * sum(output.numel() for _, output, _ in rows))  # and its gradients
    parameters_mb = _megabytes(total)
    return "\n".join(
        [
            *lines,
            rule,
            f"Total params: {total:,}",
            f"Trainable params: {trainable:,}",
            f"Non-trainable params: {total - trainable:,}",
            rule,
            f"Input size (MB): {input_mb:.3f}",
            f"Forward/backward pass size (MB): {pass_mb:.3f}",
            f"Params size (MB): {parameters_mb:.3f}",
            f"Estimated total size (MB): {input_mb + pass_mb + parameters_mb:.3f}",
            rule,
        ]
    )


def _count(layer: nn.Module, only_trainable: bool = False) -> int:
    return sum(
        parameter.numel()
        for parameter in layer.parameters()
        if parameter.requires_grad or not only_trainable
    )


def _megabytes(floats: int) -> float:
    """Return the size of so many float32 numbers."""
    return floats * 4 / _MEGABYTE
