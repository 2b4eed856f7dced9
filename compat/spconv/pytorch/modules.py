"""Containers, and dense layers that take a SparseConvTensor."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from compat.spconv import constants
from compat.spconv._names import module_getattr
from compat.spconv.pytorch._convolution import SparseConvolution
from compat.spconv.pytorch._family import LAYER_FAMILY
from compat.spconv.pytorch._module import SparseModule
from compat.spconv.pytorch._traced import is_new
from compat.spconv.pytorch.conv import SubMConv3d
from compat.spconv.pytorch.core import SparseConvTensor
from tritonspconv.graph_capture import breaks_graph, is_traced, run_untraced
from tritonspconv.nn.chain import run_chain, trace_training_norm, trains_on
from tritonspconv.nn.fusable import fuses_now

__getattr__ = module_getattr(__name__, modules={"spconv": "compat.spconv.pytorch"})


class SparseBatchNorm(nn.BatchNorm1d):
    """``BatchNorm1d`` on the features of a SparseConvTensor, or on a tensor."""

    def forward(self, input: Any) -> Any:
        """Normalise the features."""
        if not isinstance(input, SparseConvTensor):
            return super().forward(input)
        if self.training and is_traced():
            out = trace_training_norm(self, input.features)
            if out is not None:
                return input.replace_feature(out)
        return input.replace_feature(super().forward(input.features))


class SparseSyncBatchNorm(nn.SyncBatchNorm):
    """``SyncBatchNorm`` on the features of a SparseConvTensor, or on a tensor."""

    def forward(self, input: Any) -> Any:
        """Normalise the features over all processes."""
        if isinstance(input, SparseConvTensor):
            return input.replace_feature(super().forward(input.features))
        return super().forward(input)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Replace batch norms by synchronised ones, and SparseBatchNorm by this class.

        Args:
            module: The network; its batch norms share their parameters and buffers with the result.
            process_group: Processes to synchronise over. Default: all.

        Returns:
            ``module``, or its replacement if it is a batch norm itself.
        """
        if isinstance(module, SparseBatchNorm):
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
            converted.__class__ = cls
            return converted
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        for name, child in module.named_children():
            module.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return module


class SparseReLU(nn.ReLU):
    """``ReLU`` on the features of a SparseConvTensor, or on a tensor."""

    def forward(self, input: Any) -> Any:
        """Clamp the features at zero."""
        if isinstance(input, SparseConvTensor):
            return input.replace_feature(super().forward(input.features))
        return super().forward(input)


class SparseIdentity(nn.Identity):
    """``Identity`` for a SparseConvTensor, which comes back as a new object, or a tensor."""

    def forward(self, input: Any) -> Any:
        """Return the input."""
        if isinstance(input, SparseConvTensor):
            return input.replace_feature(super().forward(input.features))
        return super().forward(input)


class PrintTensorMeta(nn.Module):
    """Print the smallest value, the largest and the mean of features, and pass the input on."""

    def forward(self, x: SparseConvTensor | Tensor) -> SparseConvTensor | Tensor:
        """Return ``x``."""
        values = x.features if isinstance(x, SparseConvTensor) else x
        print(values.min(), values.max(), values.mean())  # noqa: T201
        return x


class PrintCurrentTime(nn.Module):
    """Print the seconds since the module was made, and pass the input on; waits for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.first_time = time.time()

    def forward(self, x: Any, msg: str = "", reset: bool = False) -> Any:
        """Return ``x``.

        Args:
            x: Anything.
            msg: Printed before the seconds.
            reset: Count from now.
        """
        if reset:
            self.first_time = time.time()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(msg, time.time() - self.first_time)  # noqa: T201
        return x


_TAKES_SPARSE = (SparseModule, SparseBatchNorm, SparseReLU)


def is_spconv_module(module: Any) -> bool:
    """Return whether a container should hand the SparseConvTensor itself to ``module``."""
    return isinstance(module, _TAKES_SPARSE)


def is_sparse_conv(module: Any) -> bool:
    """Return whether ``module`` is a sparse convolution; poolings are not."""
    return isinstance(module, SparseConvolution)


def assign_name_for_sparse_modules(module: nn.Module) -> None:
    """Store each sparse module's path inside ``module`` as its ``_sparse_unique_name``."""
    for name, child in module.named_modules():
        if isinstance(child, SparseModule):
            child._sparse_unique_name = name


class SparseSequential(SparseModule):
    """A chain of modules, sparse ones and dense ones.

    A sparse module (:func:`is_spconv_module`) gets the SparseConvTensor; any other module gets its
    features. Once a module returned a plain tensor, the rest of the chain works on that.

    On a GPU, and on a CPU with numba, a convolution and the batch norm and the ReLU that follow it
    run as one, unless one of them has hooks or is a class of your own. While gradients are off and
    the norm is in evaluation mode, the features between them are not rounded: float16 and bfloat16
    results are nearer to the float32 results. A norm in training is fused on a GPU alone, and gives
    torch's result up to rounding.

    Args:
        *args: The modules, named by position, or one OrderedDict of them.
        **kwargs: Further modules by name.

    Attributes:
        fuse_layers: False: run every module by itself. May be set on the class, a derived class
            or a container.

    Raises:
        ValueError: A keyword repeats a name.
    """

    fuse_layers: bool = True

    def __init__(self, *args: nn.Module | OrderedDict[str, nn.Module], **kwargs: nn.Module) -> None:
        super().__init__()
        if len(args) == 1 and isinstance(args[0], OrderedDict):
            named = list(args[0].items())
        else:
            named = [(str(place), module) for place, module in enumerate(args)]
        for name, module in named:
            self.add_module(name, module)  # pyright: ignore[reportArgumentType]
        for name, module in kwargs.items():
            if name in self._modules:
                raise ValueError(f"SparseSequential: the name {name!r} is taken; choose another.")
            self.add_module(name, module)

    def __getitem__(self, idx: int) -> nn.Module:
        """Return the module at ``idx``; negative values count from the end."""
        if not -len(self) <= idx < len(self):
            raise IndexError(f"SparseSequential: index {idx} is out of range for {len(self)}.")
        return list(self._modules.values())[idx]  # pyright: ignore[reportReturnType]

    def __len__(self) -> int:
        return len(self._modules)

    def add(self, module: nn.Module, name: str | None = None) -> None:
        """Append ``module`` as ``name``, by default its position.

        Raises:
            KeyError: The position is the name of another module.
        """
        if name is None:
            name = str(len(self._modules))
            if name in self._modules:
                raise KeyError(f"SparseSequential.add: the name {name!r} is taken; pass another.")
        self.add_module(name, module)

    def forward(self, input: SparseConvTensor | Tensor | Any) -> Any:
        """Run the chain."""
        modules: Any = self._modules.values()
        if self.fuse_layers and fuses_now() and not constants.SPCONV_FX_TRACE_MODE:
            return run_chain(LAYER_FAMILY, tuple(modules), input, _apply)
        if is_traced() and isinstance(input, SparseConvTensor):
            # Of a new tensor, torch.compile would break the graph at the first layer and compile
            # the rest apart.
            is_whole = is_new(input) or (self.fuse_layers and _is_faster_whole(self, input))
            if is_whole:
                return run_untraced(self.forward, input)
            if self.fuse_layers and fuses_now(traced=True):
                return run_chain(LAYER_FAMILY, tuple(modules), input, _apply, traced=True)
        for module in modules:
            input = _apply(module, input)
        return input


def _is_faster_whole(container: SparseSequential, input: SparseConvTensor) -> bool:
    """Return whether Python runs a container faster than graphs do.

    That is so if a module breaks the graph. On a GPU with Triton it is also so in training, where
    eager mode runs a norm and its ReLU with their convolution and a graph does not. So stages of
    several such layers, with nothing else between them, stay whole there. In inference a graph
    makes the launches of eager mode; nobody has measured yet if it is as fast.
    """
    if any(breaks_graph(type(module)) for module in container.modules()):
        return True
    if not trains_on(input.features.device):
        return False
    convolutions = 0
    for module in container.modules():
        if isinstance(module, SparseConvolution):
            convolutions += 1
        elif not isinstance(module, (SparseSequential, nn.BatchNorm1d, nn.ReLU)):
            return False
    return convolutions > 1


def _apply(module: nn.Module, input: Any) -> Any:
    if not isinstance(module, _TAKES_SPARSE) and isinstance(input, SparseConvTensor):
        return input.replace_feature(module(input.features))
    return module(input)


LAYER_FAMILY.join(
    convs=(SparseConvolution, SubMConv3d),
    norms=dict.fromkeys((nn.BatchNorm1d, nn.SyncBatchNorm, SparseBatchNorm, SparseSyncBatchNorm)),
    relus=dict.fromkeys((nn.ReLU, SparseReLU)),
    containers=(nn.Sequential, SparseSequential),
)
