"""Containers, and the layer that makes a dense tensor of a sparse one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tritonspconv.graph_capture import breaks_graph, is_traced, run_untraced
from tritonspconv.nn._family import LAYER_FAMILY
from tritonspconv.nn._module import SparseModule
from tritonspconv.nn.chain import run_chain, trains_on
from tritonspconv.nn.conv import SparseConvNd, SparseConvTransposeNd, SubMConvNd
from tritonspconv.nn.fusable import fuses_now
from tritonspconv.nn.norm import BatchNorm, SyncBatchNorm
from tritonspconv.nn.pointwise import ReLU
from tritonspconv.sparse_tensor import SparseTensor

if TYPE_CHECKING:
    from jaxtyping import Shaped


class Sequential(SparseModule, nn.Sequential):
    """Apply modules in turn, sparse ones and plain torch ones alike.

    A :class:`SparseModule` gets the running value as it is. Any other module gets the features of a
    sparse tensor and its result replaces them: it must keep the rows. A value that is no sparse
    tensor, as after :class:`ToDense`, goes to any module unchanged.

    On a GPU, and on a CPU with numba, a convolution and the batch norm and the ReLU that follow it
    run as one, unless one of them has hooks or is a class of your own. While gradients are off and
    the norm is in evaluation mode, the features between them are not rounded: float16 and bfloat16
    results are nearer to the float32 results. A norm in training is fused on a GPU alone, and gives
    torch's result up to rounding.

    Attributes:
        fuse_layers: False: apply every module by itself. May be set on the class, a derived
            class or a container.

    Example:
        >>> conv = ts.nn.SubMConv3d(4, 8, kernel_size=3)
        >>> net = ts.nn.Sequential(conv, torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        >>> net(ts.SparseTensor.from_dense(torch.ones(1, 4, 2, 2, 2))).shape
        torch.Size([8, 8])
    """

    fuse_layers: bool = True

    def forward(self, input: Any) -> Any:
        """Apply the modules in turn."""
        if self.fuse_layers and fuses_now():
            return run_chain(LAYER_FAMILY, tuple(self), input, _apply)
        if is_traced():
            if _is_faster_whole(self, input):
                return run_untraced(self.forward, input)
            if self.fuse_layers and fuses_now(traced=True):
                return run_chain(LAYER_FAMILY, tuple(self), input, _apply, traced=True)
        for module in self:
            input = _apply(module, input)
        return input


def _is_faster_whole(container: Sequential, input: Any) -> bool:
    """Return whether Python runs a container faster than graphs do.

    That is so if a module breaks the graph, and on a GPU with Triton in training: eager mode runs a
    norm with its convolution there, and a graph does not. Nobody has measured inference there yet.
    """
    if isinstance(input, SparseTensor) and trains_on(input.feats.device):
        return True
    return any(breaks_graph(type(module)) for module in container.modules())


def _apply(module: nn.Module, input: Any) -> Any:
    if isinstance(input, SparseTensor) and not isinstance(module, SparseModule):
        return input.replace(module(input.feats))
    return module(input)


class ToDense(SparseModule):
    """Turn a sparse tensor into a dense one.

    Args:
        channels_first: Layout of the result.

    Example:
        >>> x = ts.SparseTensor.from_dense(torch.ones(1, 4, 2, 2, 2))
        >>> ts.nn.ToDense()(x).shape
        torch.Size([1, 4, 2, 2, 2])
    """

    def __init__(self, channels_first: bool = True) -> None:
        super().__init__()
        self.channels_first = channels_first

    def forward(self, x: SparseTensor) -> Shaped[Tensor, "B ..."]:
        """Return ``[batch_size, C, *spatial_shape]``, or channels last."""
        return x.dense(channels_first=self.channels_first)

    def extra_repr(self) -> str:
        """Return the layout."""
        return f"channels_first={self.channels_first}"


# An inverse layer takes a second tensor, which a container cannot give it.
LAYER_FAMILY.join(
    convs=(SubMConvNd, SparseConvNd, SparseConvTransposeNd),
    norms=dict.fromkeys((nn.BatchNorm1d, nn.SyncBatchNorm, BatchNorm, SyncBatchNorm)),
    relus=dict.fromkeys((nn.ReLU, ReLU)),
    containers=(nn.Sequential, Sequential),
)
