"""Batch norm and ReLU of a container's children, together with the convolution before them.

``conv, norm, relu`` as three modules are three passes over the features, and for LiDAR networks,
which wait for the host, three times the host's work. Containers run them as one. While gradients
are off, that is one launch: the convolution normalises and clamps its sums before it rounds them.
In training, where a norm needs all sums first, it is one node of the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from tritonspconv.kernel_map import KernelMap
from tritonspconv.kernels import acc_dtype, has_triton
from tritonspconv.kernels.channel_norm import ChannelNorm, TrainingNorm
from tritonspconv.ops.conv import Precision, WeightLayout, compute_dtype, sparse_conv

Norm = ChannelNorm | TrainingNorm

_MODULE_CALL = nn.Module.__call__


class TakesUpNorm(Protocol):
    """A convolution that can normalise and clamp its output."""

    out_channels: int

    @property
    def is_linear(self) -> bool:
        """Whether nothing follows the sum and the bias."""
        ...

    def forward_fused(self, input: Any, norm: Norm | None, relu: bool) -> Any:
        """Return what ``forward``, a batch norm and a ReLU would."""


def fuses_on(device: torch.device) -> bool:
    """Return whether containers fuse on ``device``: where Triton kernels run.

    On a CPU the convolution is most of the time, and results keep the bits of single modules.
    """
    return has_triton(device)


def fuses_now() -> bool:
    """Return whether nobody watches every module."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        # torch.fx replaces it while it traces.
        or nn.Module.__call__ is not _MODULE_CALL
        or torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_backward_pre_hooks
        or torch_module._global_backward_hooks
    )


class FusedChain:
    """Runs modules in order, a convolution together with the norm and the ReLU behind it.

    A module is taken up only if calling it would run the ``forward`` that is known here, without a
    hook. Nothing is remembered between calls: modules may be replaced, switched to training or
    watched at any time.

    Args:
        tensor: The type of sparse tensors.
        features: The attribute that holds their features.
        convs: ``forward`` of each class of :class:`TakesUpNorm`; derived classes count unless they
            override it.
        norms: Classes of batch norms; derived classes do not count.
        relus: Classes of ReLUs; derived classes do not count.
    """

    def __init__(
        self,
        tensor: type,
        features: str,
        convs: Iterable[Callable[..., Any]],
        norms: Iterable[type[nn.Module]],
        relus: Iterable[type[nn.Module]],
    ) -> None:
        self._tensor = tensor
        self._features = operator.attrgetter(features)
        self._convs = frozenset(convs)
        self._norms = {kind: kind.forward for kind in norms}
        self._relus = {kind: kind.forward for kind in relus}

    def __call__(
        self, modules: Sequence[nn.Module], value: Any, apply: Callable[[nn.Module, Any], Any]
    ) -> Any:
        """Run the modules.

        Args:
            modules: The container's children.
            value: What the first one gets.
            apply: How the container runs a single module.
        """
        place, end = 0, len(modules)
        while place < end:
            module = modules[place]
            place += 1
            if place < end and self._is_conv(module, value):
                conv = cast(TakesUpNorm, module)
                norm = self._norm(modules[place], conv)
                behind = place + (norm is not None)
                relu = behind < end and _is(modules[behind], self._relus)
                # With gradients a ReLU alone saves nothing.
                if norm is not None or (relu and not torch.is_grad_enabled()):
                    value = conv.forward_fused(value, norm, relu)
                    place = behind + relu
                    continue
            value = apply(module, value)
        return value

    def _is_conv(self, module: nn.Module, value: Any) -> bool:
        return (
            type(module).forward in self._convs
            and isinstance(value, self._tensor)
            and fuses_on(self._features(value).device)
            and type(module).__call__ is _MODULE_CALL
            and _is_unwatched(module)
            and cast(TakesUpNorm, module).is_linear
        )

    def _norm(self, module: nn.Module, conv: TakesUpNorm) -> Norm | None:
        """Return a batch norm as numbers, or None if it is none or has to run itself."""
        if not _is(module, self._norms):
            return None
        norm = cast(nn.BatchNorm1d, module)
        if norm.num_features != conv.out_channels:
            return None
        try:
            # Attributes of a module are slow. What somebody keeps elsewhere is missed here.
            mean, variance = norm._buffers["running_mean"], norm._buffers["running_var"]
            weight, bias = norm._parameters["weight"], norm._parameters["bias"]
        except KeyError:
            return None
        if mean is None or variance is None:
            return None
        if norm.training:
            return _training_norm(norm, mean, variance, weight, bias)
        if torch.is_grad_enabled():
            return None
        return ChannelNorm(mean, variance, weight, bias, norm.eps)


def _training_norm(
    norm: nn.BatchNorm1d,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> TrainingNorm | None:
    """Return a batch norm in training, or None where torch has to run it.

    That is with a cumulative average of statistics, over several processes, and with vectors that
    are not float32 or not contiguous.
    """
    momentum = norm.momentum
    if momentum is None or isinstance(norm, nn.SyncBatchNorm):
        return None
    for vector in (mean, variance, weight, bias):
        if vector is None:
            continue
        if vector.dtype is not torch.float32 or not vector.is_contiguous():
            return None
    count = norm._buffers.get("num_batches_tracked")
    return TrainingNorm(mean, variance, weight, bias, count, momentum, norm.eps)


def _is(module: nn.Module, kinds: dict[type, Callable[..., Any]]) -> bool:
    """Return whether the module is of one of the classes, as they were, and runs nothing else."""
    kind = type(module)
    return kinds.get(kind) is kind.forward and _is_unwatched(module)


def _is_unwatched(module: nn.Module) -> bool:
    """Return whether calling the module runs its class's ``forward`` and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
        or "forward" in module.__dict__
    )


def convolve(
    feats: Tensor,
    weight: Tensor,
    kernel_map: KernelMap,
    bias: Tensor | None,
    precision: Precision,
    norm: Norm | None,
    relu: bool,
    *,
    weight_layout: WeightLayout = "VIO",
    residual: Tensor | None = None,
) -> Tensor:
    """Return :func:`sparse_conv`, batch norm and ReLU in one, where torch would run them.

    Torch's batch norm refuses some dtypes of features and parameters, and in training a single row;
    so does this.
    """
    apart = norm is not None and not _takes(norm, kernel_map, compute_dtype(feats, weight))
    out = sparse_conv(
        feats, weight, kernel_map, bias, weight_layout=weight_layout, precision=precision,
        norm=None if apart else norm, residual=residual, relu=relu and not apart,
    )  # fmt: skip
    return normalise(out, norm, relu) if apart else out


def normalise(feats: Tensor, norm: Norm | None, relu: bool) -> Tensor:
    """Return what torch's batch norm and ReLU make of ``feats`` [N, C]."""
    if isinstance(norm, TrainingNorm):
        mean, variance, weight, bias, count, momentum, eps = norm
        if count is not None:
            count.add_(1)
        feats = F.batch_norm(feats, mean, variance, weight, bias, True, momentum, eps)
    elif norm is not None:
        mean, variance, weight, bias, eps = norm
        feats = F.batch_norm(feats, mean, variance, weight, bias, eps=eps)
    return feats.relu() if relu else feats


def _takes(norm: Norm, kernel_map: KernelMap, dtype: torch.dtype) -> bool:
    """Return whether torch's batch norm takes the output of ``dtype``, on every device."""
    if isinstance(norm, TrainingNorm):
        return kernel_map.n_out > 1 and dtype != torch.float64
    mean, variance, weight, bias, _ = norm
    held = mean.dtype
    return (
        (held == dtype or held == acc_dtype(dtype))
        and variance.dtype == held
        and (weight is None or weight.dtype == held)
        and (bias is None or bias.dtype == held)
    )
