"""Folding of normalisation and activation into the convolutions before them, for inference."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Protocol, TypeGuard, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


@runtime_checkable
class FusableConv(Protocol):
    """A convolution that others can be folded into."""

    @property
    def is_linear(self) -> bool:
        """Whether the output is affine in the input, so that a norm can be folded."""
        ...

    def fold_scale_shift(self, scale: Tensor, shift: Tensor) -> None:
        """Make the output ``scale * output + shift``, both ``[c_out]``."""

    def fold_relu(self) -> None:
        """Make the output ``relu(output)``."""


def fuse(model: Model, *, inplace: bool = False) -> Model:
    """Fold BatchNorm and ReLU into the sparse convolutions that they follow, for inference.

    In every ``Sequential`` (torch's, ours, spconv's ``SparseSequential``), at any depth, a sparse
    convolution followed by batch norm, ReLU or both becomes one layer; the folded children are
    removed. Everything else stays as it is. A network whose ``forward`` calls its norms by hand can
    put ``conv, norm, relu`` into a ``Sequential`` to have them folded.

    Args:
        model: A network in evaluation mode, its batch norms with running statistics.
        inplace: Change ``model`` itself instead of a copy.

    Returns:
        The network, equal up to rounding. Its state dict has other names: load weights first.

    Raises:
        ValueError: The model is in training mode.
    """
    if model.training:
        raise ValueError(
            "fuse: batch norms use the statistics of each batch in training mode, which cannot be "
            "folded; call model.eval() first."
        )
    model = model if inplace else copy.deepcopy(model)
    # A layer that is used twice cannot take up what follows one of its uses.
    # Not by ``children()``, which names a layer once however often a chain holds it.
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    shared = {key for key, count in uses.items() if count > 1}
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential) or getattr(module, "runs_in_order", False):
            _fuse_chain(module, shared)
    return model


def _fuse_chain(chain: nn.Module, shared: set[int]) -> None:
    conv, folded = None, False
    for name, module in list(chain._modules.items()):
        if module is None or _is_watched(module):
            conv = None
            continue
        if conv is not None and not folded and _has_statistics(module):
            conv.fold_scale_shift(*_scale_shift(module))
        elif conv is not None and isinstance(module, nn.ReLU):
            conv.fold_relu()
            folded = True
        else:
            conv, folded = (module if _can_take_up(module, shared) else None), False
            continue
        delattr(chain, name)


def _can_take_up(module: nn.Module, shared: set[int]) -> TypeGuard[FusableConv]:
    return isinstance(module, FusableConv) and module.is_linear and id(module) not in shared


def _has_statistics(module: nn.Module) -> TypeGuard[nn.modules.batchnorm._BatchNorm]:
    return (
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.running_mean is not None
        and not module.training
    )


def _is_watched(module: nn.Module) -> bool:
    """Return whether hooks look at what the module takes or gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _scale_shift(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """Return a batch norm as ``scale * x + shift``, in float32 or better."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
    with torch.no_grad():
        scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
        if norm.affine:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale
        return scale, shift + norm.bias if norm.affine else shift
