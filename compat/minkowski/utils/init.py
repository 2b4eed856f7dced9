"""Initial weights of ``MinkowskiEngine.utils.init``."""

import math

import torch
from torch import Tensor

from compat.minkowski._errors import MinkowskiError


def kaiming_normal_(
    tensor: Tensor, a: float = 0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> Tensor:
    """Fill a kernel in place with normal numbers of He et al.'s variance.

    A kernel [V, in, out] has fans ``V * in`` and ``V * out``. As in the original, a kernel of two
    axes, [in, out], is read as the weight of a linear layer, [out, in]. Its fans are therefore
    swapped.

    Args:
        tensor: The kernel.
        a: Negative slope of a leaky ReLU.
        mode: ``"fan_in"`` or ``"fan_out"``, in any case.
        nonlinearity: As for :func:`torch.nn.init.calculate_gain`.

    Returns:
        ``tensor``.

    Raises:
        ValueError: The kernel has fewer than two axes, or the mode is unknown.
    """
    fan_in, fan_out = _fans(tensor)
    fans: dict[str, int] = {"fan_in": fan_in, "fan_out": fan_out}
    if mode.lower() not in fans:
        raise MinkowskiError(f"kaiming_normal_: mode must be one of {list(fans)}; got {mode!r}.")
    # The original accepts any string; torch's type lists the nonlinearities.
    gain = torch.nn.init.calculate_gain(nonlinearity, a)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        return tensor.normal_(0, gain / math.sqrt(fans[mode.lower()]))


def _fans(tensor: Tensor) -> tuple[int, int]:
    if tensor.ndim < 2:
        raise MinkowskiError(
            f"kaiming_normal_: tensor must have at least 2 axes; got shape {list(tensor.shape)}."
        )
    if tensor.ndim == 2:
        return tensor.shape[1], tensor.shape[0]
    return tensor.shape[0] * tensor.shape[1], tensor.shape[0] * tensor.shape[2]
