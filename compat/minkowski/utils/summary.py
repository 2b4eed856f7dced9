"""A table of a network's layers: ``MinkowskiEngine.utils.summary``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compat.minkowski._names import module_getattr

_RULE = 64
_MEBIBYTE = 1024**2
# The original's guess of the memory that a hashed coordinate takes, in units of a coordinate.
_HASH_OVERHEAD = 2


@dataclass
class _Layer:
    name: str
    output_shape: list[Any]
    parameters: int
    trainable: bool


def summary(model: nn.Module, summary_input: Any) -> tuple[int, int]:
    """Run a network once and print its layers, the shapes of their outputs and their parameters.

    Args:
        model: The network.
        summary_input: The sparse tensor that it is run on.

    Returns:
        The number of parameters, and the number of trainable parameters.
    """
    text, counts = minkowski_summary_string(model, summary_input)
    print(text)  # noqa: T201  The function's purpose.
    return counts


def minkowski_summary_string(model: nn.Module, summary_input: Any) -> tuple[str, tuple[int, int]]:
    """Return the table that :func:`summary` prints, and the two numbers it returns.

    Args:
        model: The network.
        summary_input: The sparse tensor that it is run on.
    """
    layers = _run(model, summary_input)
    total = sum(layer.parameters for layer in layers)
    trainable = sum(layer.parameters for layer in layers if layer.trainable)
    n_rows, channels = summary_input.shape
    n_input = n_rows * channels + n_rows * (1 + summary_input.D) * _HASH_OVERHEAD
    # Every output counts twice, for its gradient; a number takes four bytes.
    n_output = 2 * sum(_numel(layer.output_shape) for layer in layers)
    sizes = [4 * n / _MEBIBYTE for n in (n_input, n_output, total)]
    lines = [
        "-" * _RULE,
        f"{'Layer (type)':>20}  {'Output Shape':>25} {'Param #':>15}",
        "=" * _RULE,
        *(
            f"{layer.name:>20}  {layer.output_shape!s:>25} {layer.parameters:>15,}"
            for layer in layers
        ),
        "=" * _RULE,
        f"Total params: {total:,}",
        f"Trainable params: {trainable:,}",
        f"Non-trainable params: {total - trainable:,}",
        "-" * _RULE,
        f"Input size (MB): {sizes[0]:.2f}",
        f"Forward/backward pass size (MB): {sizes[1]:.2f}",
        f"Params size (MB): {sizes[2]:.2f}",
        f"Estimated Total Size (MB): {sum(sizes):.2f}",
        "-" * _RULE,
    ]
    return "".join(f"{line}\n" for line in lines), (total, trainable)


def _run(model: nn.Module, summary_input: Any) -> list[_Layer]:
    """Return the layers of ``model`` in the order in which they finish."""
    layers: list[_Layer] = []

    def record(module: nn.Module, _: Any, output: Any) -> None:
        name = f"{type(module).__name__}-{len(layers) + 1}"
        several = isinstance(output, (list, tuple))
        shape = [list(each.shape) for each in output] if several else list(output.shape)
        own = {key: getattr(module, key, None) for key in ("weight", "kernel", "bias")}
        tensors = {key: value for key, value in own.items() if isinstance(value, Tensor)}
        # As in the original, the weight decides for the bias.
        decisive = [value for key, value in tensors.items() if key != "bias"]
        trainable = bool(decisive) and decisive[-1].requires_grad
        n_parameters = sum(value.numel() for value in tensors.values())
        layers.append(_Layer(name, shape, n_parameters, trainable))

    handles: list[RemovableHandle] = [
        module.register_forward_hook(record)
        for module in model.modules()
        if not isinstance(module, (nn.Sequential, nn.ModuleList))
    ]
    try:
        model(summary_input)
    finally:
        for handle in handles:
            handle.remove()
    return layers


def _numel(shape: list[Any]) -> int:
    if shape and isinstance(shape[0], list):
        return sum(math.prod(each) for each in shape)
    return math.prod(shape)


__getattr__ = module_getattr(__name__)
