"""The convolution itself, with a weight that the caller passes; it has no parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compat.spconv import constants
from compat.spconv.core import Activation, ConvAlgo
from compat.spconv.pytorch._errors import SpconvError, rows_differ
from compat.spconv.pytorch._maps import map_for
from compat.spconv.pytorch._numbers import per_axis
from compat.spconv.pytorch._pair_ops import activate
from compat.spconv.pytorch._reuse import check_inverse_reuse, check_submanifold_reuse
from compat.spconv.pytorch._voxel_count import count_voxels
from compat.spconv.pytorch.core import SparseConvTensor
from tritonspconv import ops
from tritonspconv.guide import more
from tritonspconv.nn.chain import convolve, normalise
from tritonspconv.nn.fusable import Norm

if TYPE_CHECKING:
    from compat.spconv.pytorch._repeats import RepeatedSites
    from tritonspconv.kernel_map import KernelMap
    from tritonspconv.ops.conv import Precision

IntOrInts = int | Sequence[int]


class SparseConvolutionBase:
    """Geometry of a sparse convolution, and the convolution itself.

    Derived classes call :meth:`_conv_forward` with a weight and a bias, and may override it and the
    checks of a shared ``indice_key``: every convolution goes through these methods.

    Args:
        ndim: Number of spatial axes.
        in_channels, out_channels: Channels.
        kernel_size, stride, padding, dilation: One int, or one per axis. A submanifold layer takes
            ``stride`` and ``padding`` and ignores them, as spconv does.
        groups: Must be 1.
        bias: Accepted, without effect.
        subm: Submanifold: outputs at the input sites; odd kernel sizes only.
        output_padding: Extra extent of a transposed output.
        transposed, inverse: Transposed convolution; inverse of the layer that recorded the key.
        indice_key: Name under which the kernel map travels downstream in ``indice_dict``.
        algo: Label that layers of one key must share; no result depends on it. Default: spconv's.
        fp32_accum: Accepted; products are always accumulated in float32.
        record_voxel_count: Kept as an attribute.
        act_type, act_alpha, act_beta: Activation of the output; ``act_alpha`` is LeakyReLU's slope.
        large_kernel_fast_algo: True: spconv's default ``algo`` is an implicit GEMM up to 128 taps;
            False: up to 32.

    Raises:
        SpconvError: ``groups`` is not 1, a sequence has the wrong length, or a 1x1 layer is padded.
    """

    def __init__(
        self,
        ndim: int,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrInts = 3,
        stride: IntOrInts = 1,
        padding: IntOrInts = 0,
        dilation: IntOrInts = 1,
        groups: int = 1,
        bias: bool = True,
        subm: bool = False,
        output_padding: IntOrInts = 0,
        transposed: bool = False,
        inverse: bool = False,
        indice_key: str | None = None,
        algo: ConvAlgo | None = None,
        fp32_accum: bool | None = None,
        record_voxel_count: bool = False,
        act_type: Activation = Activation.None_,
        act_alpha: float = 0,
        act_beta: float = 0,
        large_kernel_fast_algo: bool = False,
    ) -> None:
        if groups != 1:
            raise SpconvError(f"groups must be 1; got {groups}. Grouped layers do not exist yet.")
        self.ndim = ndim
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = per_axis("kernel_size", ndim, kernel_size)
        self.stride = per_axis("stride", ndim, stride)
        self.padding = per_axis("padding", ndim, padding)
        self.dilation = per_axis("dilation", ndim, dilation)
        self.output_padding = per_axis("output_padding", ndim, output_padding)
        self.groups = groups
        self.subm = subm
        self.transposed = transposed
        self.inverse = inverse
        self.indice_key = indice_key
        self.fp32_accum = fp32_accum
        self.record_voxel_count = record_voxel_count
        self.act_type = act_type
        self.act_alpha = act_alpha
        self.act_beta = act_beta
        self.scale = 1.0
        self.zero_point = 0
        self.conv1x1 = self._is_pointwise()
        self.algo = self._default_algo(large_kernel_fast_algo) if algo is None else algo
        self.weight_shape = [out_channels, *self.kernel_size, in_channels]

    def _is_pointwise(self) -> bool:
        """Return whether the layer works row by row.

        Raises:
            SpconvError: Such a layer, not submanifold, has padding.
        """
        if math.prod(self.kernel_size) != 1 or (not self.subm and math.prod(self.stride) != 1):
            return False
        if not self.subm and any(self.padding):
            raise SpconvError(
                f"a 1x1 convolution of stride 1 takes no padding; got padding={self.padding}. "
                "Pass padding=0."
            )
        return True

    def _default_algo(self, large_kernel_fast_algo: bool) -> ConvAlgo:
        limit = 128 if large_kernel_fast_algo else 32
        small = math.prod(self.kernel_size) <= limit
        return ConvAlgo.MaskImplicitGemm if small else ConvAlgo.Native

    def is_inverseable(self) -> bool:
        """Return whether an inverse convolution can undo this layer."""
        return self.indice_key is not None and not self.subm

    def _conv_forward(
        self,
        training: bool,
        input: SparseConvTensor,
        weight: Tensor,
        bias: Tensor | None,
        add_input: SparseConvTensor | None = None,
        channel_scale: Tensor | None = None,
        output_scale: float | None = None,
        name: str | None = None,
        sparse_unique_name: str = "",
        act_type: Activation = Activation.None_,
        act_alpha: float = 0,
        act_beta: float = 0,
    ) -> SparseConvTensor:
        """Convolve with a given weight and bias.

        Args:
            training: Accepted, without effect: results are the same in training and evaluation.
            input: Features ``[N, in_channels]`` at active sites.
            weight: ``[out_channels, *kernel_size, in_channels]``.
            bias: ``[out_channels]``.
            add_input: Added to the output row by row, before the activation.
            channel_scale: Belongs to int8 layers; must be None.
            output_scale: Belongs to int8 layers; must be None.
            name: Accepted, without effect.
            sparse_unique_name: Accepted, without effect.
            act_type: Activation of the output.
            act_alpha: LeakyReLU's slope.
            act_beta: Accepted, without effect.

        Raises:
            NotImplementedError: An argument of int8 layers is given.
            SpconvError: Channels do not fit, or a shared key does not.
        """
        if channel_scale is not None or output_scale is not None:
            raise NotImplementedError(
                "_conv_forward: channel_scale and output_scale belong to int8 layers, which do not "
                "exist here. Use float16 or bfloat16."
            )
        residual = None if add_input is None else add_input.features
        return self._run(input, weight, bias, residual, act_type, act_alpha)

    def _check_subm_reuse_valid(
        self, inp: SparseConvTensor, spatial_shape: list[int], datas: Any
    ) -> None:
        """Check that this submanifold layer may reuse the entry ``datas`` of ``indice_dict``."""
        check_submanifold_reuse(self, inp, datas)

    def _check_inverse_reuse_valid(
        self, inp: SparseConvTensor, spatial_shape: list[int], datas: Any
    ) -> None:
        """Check that this inverse layer may read the entry ``datas`` of ``indice_dict``."""
        check_inverse_reuse(self, inp, datas)

    def _run(
        self,
        input: SparseConvTensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        act_type: Activation,
        act_alpha: float,
        norm: Norm | None = None,
        relu: bool = False,
    ) -> SparseConvTensor:
        """Convolve, normalise, add, clamp; ``norm`` and ``relu`` need a layer without activation.

        An activation of the layer comes last.
        """
        features = self._features_of(input, weight)
        relu = relu or act_type is Activation.ReLU
        if self.conv1x1 and not (self.inverse and self.indice_key in input.indice_dict):
            indice_dict, located = input.indice_dict, None
            feats = ops.pointwise_conv(features, self._matrices(weight)[0], bias)
            feats = normalise(feats, norm, relu, residual)
        else:
            found = map_for(self, input)
            indice_dict, located = found.indice_dict, found.located
            precision = "tf32" if constants.SPCONV_ALLOW_TF32 else "ieee"
            try:
                if found.repeats is None:
                    matrices, layout = weight, "OVI"
                    if self.conv1x1:
                        matrices, layout = self._matrices(weight), "VIO"
                    feats = convolve(
                        features, matrices, found.kernel_map, bias, precision, norm, relu,
                        weight_layout=layout, residual=residual,
                    )  # fmt: skip
                else:
                    feats = self._convolve_repeats(
                        features, weight, bias, found.kernel_map, found.repeats, precision
                    )
                    feats = normalise(feats, norm, relu, residual)
            except ValueError as error:
                rows, sites = input.features.shape[0], input.indices.shape[0]
                if rows != sites:
                    raise rows_differ(type(self).__name__, rows, sites) from error
                raise
        if act_type not in (Activation.None_, Activation.ReLU):
            feats = activate(feats, act_type, act_alpha)
        if self.record_voxel_count and not self.subm and not self.inverse:
            count_voxels(self, feats.shape[0])
        return input._successor(feats, indice_dict, located)

    def _features_of(self, input: SparseConvTensor, weight: Tensor) -> Tensor:
        """Return the features, in the dtype of the weight."""
        if not isinstance(input, SparseConvTensor):
            raise TypeError(
                f"{type(self).__name__} takes a SparseConvTensor; got {type(input).__name__}. "
                "Inside nn.Sequential, follow sparse layers by sparse modules only."
                + more("sparse-input")
            )
        features = input.features
        if features.shape[-1] != self.in_channels:
            raise SpconvError(
                f"channel size mismatch: {type(self).__name__} has in_channels="
                f"{self.in_channels}; got features {tuple(features.shape)}."
            )
        if features.dtype != weight.dtype and not torch.is_autocast_enabled(features.device.type):
            features = features.to(weight.dtype)
        return features

    def _matrices(self, weight: Tensor) -> Tensor:
        """Return the matrix of each tap, a view ``[V, in, out]``.

        The memory of a 1x1 layer's weight is read as ``[in, out]``, as in spconv. If ``in != out``,
        that is a reinterpretation, not a transpose, of ``[out, 1, .., 1, in]``; published
        checkpoints were trained with it.
        """
        if self.conv1x1:
            return weight.reshape(1, self.in_channels, self.out_channels)
        return weight.flatten(1, -2).permute(1, 2, 0)

    def _convolve_repeats(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernel_map: KernelMap,
        repeats: RepeatedSites,
        precision: Precision,
    ) -> Tensor:
        """Convolve rows that share sites."""
        matrices = self._matrices(weight)
        if self.subm:
            feats = repeats.convolve_submanifold(features, matrices, kernel_map.geometry, precision)
        elif self.inverse:
            feats = repeats.spread(
                ops.sparse_conv(features, matrices, kernel_map, precision=precision)
            )
        else:
            feats = ops.sparse_conv(
                repeats.add_up(features), matrices, kernel_map, precision=precision
            )
        if bias is None:
            return feats
        # The expanded bias is rounded, so the gradient of the bias is summed in its own dtype.
        return feats + bias.expand_as(feats).to(feats.dtype)
