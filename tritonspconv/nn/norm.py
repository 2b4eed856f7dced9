"""Normalisation layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tritonspconv.graph_capture import is_traced
from tritonspconv.nn._module import FeatureModule, SparseModule
from tritonspconv.nn.chain import trace_training_norm
from tritonspconv.ops.global_pool import global_broadcast, global_pool
from tritonspconv.sparse_tensor import SparseTensor


class BatchNorm(FeatureModule, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` over all rows of all samples.

    Without rows the layer returns no rows and does not change the running statistics. One row has
    no variance: in training the layer raises ValueError, as torch's does.

    Example:
        >>> x = ts.SparseTensor.from_dense(torch.tensor([[[1.0, 0.0, 3.0]]]))
        >>> ts.nn.BatchNorm(1)(x).feats.round()
        tensor([[-1.],
                [ 1.]], grad_fn=<RoundBackward0>)
    """

    def forward(self, input: Any) -> Any:
        """Normalise the features of a sparse tensor, or a plain tensor."""
        if not self.training:
            return super().forward(input)
        feats = input.feats if isinstance(input, SparseTensor) else input
        if feats.shape[0]:
            if is_traced() and (out := trace_training_norm(self, feats)) is not None:
                return input.replace(out) if isinstance(input, SparseTensor) else out
            return super().forward(input)
        # Weight and bias take part in the graph, so that their gradients are zero, not None.
        empty = feats * self.weight + self.bias if self.affine else feats
        return input.replace(empty) if isinstance(input, SparseTensor) else empty


class SyncBatchNorm(FeatureModule, nn.SyncBatchNorm):
    """:class:`torch.nn.SyncBatchNorm` over all rows of all samples of all processes."""

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Replace every batch norm in ``module``: ours by this class, torch's by torch's."""
        if isinstance(module, BatchNorm):
            return cls._from_batch_norm(module, process_group)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        for name, child in module.named_children():
            setattr(module, name, cls.convert_sync_batchnorm(child, process_group))
        return module

    @classmethod
    def _from_batch_norm(cls, norm: BatchNorm, process_group: Any) -> SyncBatchNorm:
        """Return the same layer, parameters and buffers shared, synchronised between processes."""
        sync = cls(
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            process_group,
        )
        sync._parameters.update(norm._parameters)
        sync._buffers.update(norm._buffers)
        return sync.train(norm.training)


class LayerNorm(FeatureModule, nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` over the channels of each row."""


class GroupNorm(SparseModule):
    """Normalise groups of channels over all rows of each sample, by their biased variance.

    The layer computes statistics in float32 (float64 for float64), in training and in evaluation
    alike.

    Args:
        num_groups: Groups that the channels are divided into.
        num_channels: Channels.
        eps: Added to the variance.
        affine: Scale and shift each channel by learnt numbers.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: The groups do not divide the channels.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"{type(self).__name__}: num_groups={num_groups} must divide "
                f"num_channels={num_channels}."
            )
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine
        for name in ("weight", "bias"):
            made = torch.empty(num_channels, device=device, dtype=dtype) if affine else None
            self.register_parameter(name, None if made is None else nn.Parameter(made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set scales to one and shifts to zero."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Normalise the features; a sample without rows stays without rows."""
        if x.channels != self.num_channels:
            raise ValueError(
                f"{type(self).__name__}: x must have {self.num_channels} channels; got {x}."
            )
        feats = x.feats if x.dtype == torch.float64 else x.feats.float()
        centred = feats - global_broadcast(self._group_mean(x, feats), x.batch_index)
        variance = self._group_mean(x, centred.square())
        feats = centred * global_broadcast((variance + self.eps).rsqrt(), x.batch_index)
        if self.weight is not None and self.bias is not None:
            feats = feats * self.weight + self.bias
        return x.replace(feats.to(x.dtype))

    def _group_mean(self, x: SparseTensor, feats: Tensor) -> Tensor:
        """Return the mean of each group in each sample, for each channel [batch_size, C]."""
        mean = global_pool(feats, x.batch_index, x.batch_size, "avg")
        size = self.num_channels // self.num_groups
        if size == 1:
            return mean
        return mean.unflatten(1, (self.num_groups, size)).mean(2).repeat_interleave(size, dim=1)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}"


class InstanceNorm(GroupNorm):
    """Normalise each channel over all rows of each sample, by its biased variance.

    Args:
        num_channels: Channels.
        eps: Added to the variance.
        affine: Scale and shift each channel by learnt numbers.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, num_channels, eps, affine, device, dtype)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.num_channels}, eps={self.eps}, affine={self.affine}"
