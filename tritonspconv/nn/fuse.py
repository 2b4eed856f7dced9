"""Folding of batch norm and ReLU into the weights of the convolutions before them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TypeVar

from torch import nn

from tritonspconv.nn.fusable import FusableConv, family_of, owns_its_weight, scale_and_shift

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, *, inplace: bool = False) -> Model:
    """Fold batch norm and ReLU into the weights of the convolutions that they follow.

    In every container that runs its children in order (torch's ``Sequential``, ours, spconv's
    ``SparseSequential``), at any depth, a sparse convolution followed by batch norm, ReLU or both
    becomes one layer; the folded children are removed. Layers of :mod:`tritonspconv.nn`,
    ``compat.spconv`` and ``compat.minkowski`` are folded. Everything else stays as it is, above all
    modules that run code of yours: classes that override ``forward``, modules with hooks, with a
    ``forward`` of their own or with a parametrised weight (``weight_norm``), layers that are used
    in two places, batch norms without running statistics or in training mode.

    To speed up a network whose ``forward`` calls its norms by hand, use
    :func:`tritonspconv.optimize`, which also keeps parameters and training.

    Args:
        model: A network in evaluation mode. Its containers must be called as a whole: code that
            runs single children of a container by index finds other children after folding.
        inplace: Change ``model`` itself instead of a copy.

    Returns:
        The network, equal up to rounding. Its state dict has other names: load weights first.

    Raises:
        ValueError: The model is in training mode.

    Example:
        >>> conv = ts.nn.SubMConv3d(4, 8, kernel_size=3)
        >>> net = ts.nn.Sequential(conv, ts.nn.BatchNorm(8), ts.nn.ReLU()).eval()
        >>> len(net), len(ts.fuse(net))
        (3, 1)
    """
    if model.training:
        raise ValueError(
            "fuse: batch norms use the statistics of each batch in training mode, which cannot be "
            "folded; call model.eval() first."
        )
    model = model if inplace else copy.deepcopy(model)
    shared = _used_twice(model)
    for module in list(model.modules()):
        _fold_children(module, shared)
    return model


def _used_twice(model: nn.Module) -> set[int]:
    """Return the ids of modules that are children in more than one place."""
    # ``children()`` would return a module once, even if a container holds it twice.
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    return {key for key, count in uses.items() if count > 1}


def _fold_children(container: nn.Module, shared: set[int]) -> None:
    """Fold the modules behind each convolution of a container into it, and remove these modules."""
    conv: FusableConv | None = None
    for name, module in list(container._modules.items()):
        if module is None:
            continue
        if conv is not None and _fold(module, conv):
            delattr(container, name)
        else:
            conv = _folding_conv(module, container, shared)


def _folding_conv(module: nn.Module, container: nn.Module, shared: set[int]) -> FusableConv | None:
    """Return ``module`` if it is a convolution that its followers can be folded into, or None."""
    family = family_of(module)
    if (
        family is None
        or id(module) in shared
        or not family.is_container(container)
        or not owns_its_weight(module)
    ):
        return None
    return family.conv(module)


def _fold(module: nn.Module, conv: FusableConv) -> bool:
    """Fold a batch norm or a ReLU into ``conv``; return whether that was possible."""
    # After a ReLU the layer is no longer linear: nothing else can be folded.
    if not conv.is_linear:
        return False
    family = conv.layer_family()
    if family.is_relu(module):
        conv.fold_relu()
        return True
    norm = family.batch_norm(module)
    numbers = None if norm is None else scale_and_shift(norm, conv.out_channels)
    if numbers is None:
        return False
    conv.fold_scale_shift(*numbers)
    return True
