"""Normalisation of ``MinkowskiEngine.MinkowskiNormalization``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._features import AnyTensor, features_of, with_features
from compat.minkowski._names import module_getattr
from compat.minkowski._traced import is_plain
from compat.minkowski.enums import PoolingMode
from compat.minkowski.MinkowskiBroadcast import (
    MinkowskiBroadcastAddition,
    MinkowskiBroadcastMultiplication,
)
from compat.minkowski.MinkowskiCommon import (
    KNOWN_DIMENSION,
    MinkowskiModuleBase,
    renamed_arguments,
)
from compat.minkowski.MinkowskiPooling import MinkowskiGlobalAvgPooling
from compat.minkowski.MinkowskiSparseTensor import SparseTensor
from tritonspconv.graph_capture import is_traced
from tritonspconv.nn.chain import trace_training_norm


class MinkowskiBatchNorm(nn.Module):
    """:class:`torch.nn.BatchNorm1d`, the attribute ``bn``, over all rows of all samples.

    Args:
        num_features: Channels.
        eps: Added to the variance.
        momentum: Weight of the newest batch in the running statistics; None: plain averages.
        affine: Scale and shift each channel by learnt numbers.
        track_running_stats: Keep statistics for evaluation.
    """

    bn: nn.BatchNorm1d | nn.SyncBatchNorm

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(num_features, eps, momentum, affine, track_running_stats)

    def forward(self, input: AnyTensor) -> AnyTensor:
        """Normalise the features of a sparse tensor or field."""
        if is_traced() and is_plain(input, SparseTensor):
            out = trace_training_norm(self.bn, input._F)
            return with_features(input, self.bn(input._F) if out is None else out)
        return with_features(input, self.bn(features_of(input)))

    def __repr__(self) -> str:
        bn = self.bn
        return (
            f"{type(self).__name__}({bn.num_features}, eps={bn.eps}, momentum={bn.momentum}, "
            f"affine={bn.affine}, track_running_stats={bn.track_running_stats})"
        )


class MinkowskiSyncBatchNorm(MinkowskiBatchNorm):
    """:class:`torch.nn.SyncBatchNorm`, the attribute ``bn``, over the rows of all processes.

    Args:
        num_features: Channels.
        eps: Added to the variance.
        momentum: Weight of the newest batch in the running statistics; None: plain averages.
        affine: Scale and shift each channel by learnt numbers.
        track_running_stats: Keep statistics for evaluation.
        process_group: Processes to synchronise over. Default: all.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        self.bn = nn.SyncBatchNorm(
            num_features, eps, momentum, affine, track_running_stats, process_group
        )

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Replace every MinkowskiBatchNorm by a synchronised one; torch's batch norms stay.

        Args:
            module: The network; its batch norms share parameters and buffers with the result.
            process_group: Processes to synchronise over. Default: all.

        Returns:
            ``module``, or its replacement if it is a batch norm itself.
        """
        if isinstance(module, MinkowskiBatchNorm):
            return cls._from_batch_norm(module, process_group)
        for name, child in module.named_children():
            setattr(module, name, cls.convert_sync_batchnorm(child, process_group))
        return module

    @classmethod
    def _from_batch_norm(
        cls, module: MinkowskiBatchNorm, process_group: Any
    ) -> MinkowskiSyncBatchNorm:
        bn = module.bn
        sync = MinkowskiSyncBatchNorm(
            bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, process_group
        )
        sync.bn._parameters.update(bn._parameters)
        sync.bn._buffers.update(bn._buffers)
        return sync.train(module.training)


class MinkowskiInstanceNormFunction:
    """The arithmetic of :class:`MinkowskiInstanceNorm`, called as the original's function is."""

    # Without instance attributes, a patched ``apply`` is an error, not ignored.
    __slots__ = ()

    @staticmethod
    def apply(
        in_feat: Tensor,
        in_coords_key: Any,
        glob_coords_key: Any = None,
        coords_manager: Any = None,
        gpooling_mode: Any = PoolingMode.GLOBAL_AVG_POOLING_KERNEL,
    ) -> Tensor:
        """Normalise each channel over the rows of each sample, by its biased variance.

        Args:
            in_feat: Features [N, C].
            in_coords_key: Their coordinates.
            glob_coords_key: Ignored.
            coords_manager: The manager of the key.
            gpooling_mode: Ignored, because all modes give the same mean.
        """
        x = SparseTensor(
            in_feat, coordinate_map_key=in_coords_key, coordinate_manager=coords_manager
        )
        return _normalised(x, eps=1e-8).F


@renamed_arguments(dimension=KNOWN_DIMENSION, D=KNOWN_DIMENSION)
class MinkowskiInstanceNorm(MinkowskiModuleBase):
    """Normalise each channel over the rows of each sample, by its biased variance.

    The same in training and evaluation; ``eps`` is 1e-8.

    Args:
        num_features: Channels.
    """

    eps = 1e-8

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.empty(1, num_features))
        self.bias = nn.Parameter(torch.empty(1, num_features))
        self.inst_norm = self._own_function = MinkowskiInstanceNormFunction()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set scales to one and shifts to zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: SparseTensor) -> SparseTensor:
        """Normalise a sparse tensor.

        Raises:
            AssertionError: ``input`` is no sparse tensor.
        """
        if not isinstance(input, SparseTensor):
            raise MinkowskiError(
                f"{type(self).__name__}: input must be a SparseTensor; got {type(input).__name__}."
            )
        if self.inst_norm is not self._own_function:
            features = self.inst_norm.apply(
                input.F, input.coordinate_map_key, None, input.coordinate_manager
            )
        else:
            features = _normalised(input, self.eps).F
        return with_features(input, features * self.weight + self.bias)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(nchannels={self.num_features})"


class MinkowskiStableInstanceNorm(MinkowskiInstanceNorm):
    """:class:`MinkowskiInstanceNorm` with an ``eps`` of 1e-6.

    Args:
        num_features: Channels.
    """

    eps = 1e-6


_mean = MinkowskiGlobalAvgPooling()
_add = MinkowskiBroadcastAddition()
_multiply = MinkowskiBroadcastMultiplication()


def _normalised(x: SparseTensor, eps: float) -> SparseTensor:
    mean = _mean(x)
    centred = _add(x, with_features(mean, -mean.F))
    variance = _mean(with_features(centred, centred.F.square()))
    return _multiply(centred, with_features(variance, (variance.F + eps).rsqrt()))


__getattr__ = module_getattr(__name__)
