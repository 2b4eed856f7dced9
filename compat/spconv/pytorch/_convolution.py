"""The base of spconv's convolutions; parameters are ``weight [out, *k, in]`` and ``bias``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compat.spconv import constants
from compat.spconv.core import Activation, ConvAlgo
from compat.spconv.pytorch._errors import SpconvError
from compat.spconv.pytorch._maps import inverse_map, strided_map, submanifold_map
from compat.spconv.pytorch._pair_ops import activate
from compat.spconv.pytorch._repeats import RepeatedSites
from compat.spconv.pytorch._sites import IndiceDict
from compat.spconv.pytorch._voxel_count import CountsVoxels
from compat.spconv.pytorch.core import SparseConvTensor, expand_nd
from compat.spconv.pytorch.modules import (
    SparseBatchNorm,
    SparseReLU,
    SparseSequential,
    SparseSyncBatchNorm,
)
from tritonspconv import ops
from tritonspconv.kernel_map import KernelMap
from tritonspconv.nn.chain import convolve, normalise
from tritonspconv.nn.fusable import LayerFamily, Norm

IntOrInts = int | Sequence[int]


class SparseConvolution(CountsVoxels):
    """Base of all sparse convolutions.

    Args:
        ndim: Number of spatial axes.
        in_channels, out_channels: Channels.
        kernel_size, stride, padding, dilation: One int, or one per axis. A submanifold layer takes
            ``stride`` and ``padding`` and ignores them, as spconv does.
        groups: Must be 1.
        bias: Whether to learn a bias.
        subm: Submanifold: outputs at the input sites; odd kernel sizes only.
        output_padding: Extra extent of a transposed output.
        transposed, inverse: Transposed convolution; inverse of the layer that recorded the key.
        indice_key: Name under which the kernel map travels downstream in ``indice_dict``.
        algo: Label that layers of one key must share; no result depends on it. Default: spconv's.
        fp32_accum: Accepted; products are always accumulated in float32.
        record_voxel_count: Keep the largest number of output sites of a training step in the buffer
            ``max_num_voxels_during_training``.
        act_type, act_alpha, act_beta: Activation of the output; ``act_alpha`` is LeakyReLU's slope.
        large_kernel_fast_algo: Moves the kernel volume where spconv's default ``algo`` changes.
        name: Kept as an attribute.
        device, dtype: Of the parameters.

    Raises:
        SpconvError: ``groups`` is not 1, a sequence has the wrong length, or a 1x1 layer is padded.
    """

    bias: nn.Parameter | None

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
        name: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name=name)
        if groups != 1:
            raise SpconvError(f"groups must be 1; got {groups}. Grouped layers do not exist yet.")
        self.ndim = ndim
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = expand_nd(ndim, kernel_size)
        self.stride = expand_nd(ndim, stride)
        self.padding = expand_nd(ndim, padding)
        self.dilation = expand_nd(ndim, dilation)
        self.output_padding = expand_nd(ndim, output_padding)
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
        self.weight = nn.Parameter(torch.empty(self.weight_shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._init_voxel_count(device)
        self.reset_parameters()

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

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly from ``+-1 / sqrt(in_channels * kernel volume)``."""
        fan_in = self.in_channels * math.prod(self.kernel_size)
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        """Return the arguments as spconv prints them."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"output_padding={self.output_padding}"
        )
        if self.bias is None:
            text += ", bias=False"
        return f"{text}, algo={self.algo}"

    def is_inverseable(self) -> bool:
        """Return whether an inverse convolution can undo this layer."""
        return self.indice_key is not None and not self.subm

    def forward(
        self, input: SparseConvTensor, add_input: SparseConvTensor | None = None
    ) -> SparseConvTensor:
        """Convolve.

        Args:
            input: Features ``[N, in_channels]`` at active sites.
            add_input: Added to the output row by row, before the activation.
        """
        return self._run(input, None if add_input is None else add_input._features)

    def layer_family(self) -> LayerFamily:
        """Return the layers that this convolution may be fused with."""
        return LAYER_FAMILY

    def forward_fused(
        self,
        input: SparseConvTensor,
        norm: Norm | None,
        relu: bool,
        residual: Tensor | None = None,
    ) -> SparseConvTensor:
        """Convolve, normalise, add ``residual`` [N, out_channels] and clamp, in that order."""
        return self._run(input, residual, norm, relu)

    def _run(
        self,
        input: SparseConvTensor,
        residual: Tensor | None,
        norm: Norm | None = None,
        relu: bool = False,
    ) -> SparseConvTensor:
        """Convolve, normalise, add, clamp; ``norm`` and ``relu`` need a layer without activation.

        An activation of the layer comes last.
        """
        features, weight = self._operands(input)
        located = None
        if self.conv1x1 and not (self.inverse and self.indice_key in input.indice_dict):
            indice_dict = input.indice_dict
            relu = relu or self.act_type is Activation.ReLU
            feats = normalise(self._pointwise(features, weight), norm, relu, residual)
        else:
            if self.subm:
                kernel_map, indice_dict, repeats = submanifold_map(self, input)
            elif self.inverse:
                kernel_map, located = inverse_map(self, input)
                indice_dict, repeats = IndiceDict(input.indice_dict), located.repeats_in(kernel_map)
            else:
                kernel_map, indice_dict, located, repeats = strided_map(self, input)
            feats = self._convolve(features, weight, kernel_map, repeats, residual, norm, relu)
        if self.act_type not in (Activation.None_, Activation.ReLU):
            feats = activate(feats, self.act_type, self.act_alpha)
        if self.record_voxel_count:
            self._count_voxels(feats)
        return input._derive(feats, indice_dict, located)

    def _operands(self, input: SparseConvTensor) -> tuple[Tensor, Tensor]:
        """Return features and weight of one dtype."""
        if not isinstance(input, SparseConvTensor):
            raise TypeError(
                f"{type(self).__name__} takes a SparseConvTensor; got {type(input).__name__}. "
                "Inside nn.Sequential, follow sparse layers by sparse modules only."
            )
        features, weight = input._features, self.weight
        if features.shape[-1] != self.in_channels:
            raise SpconvError(
                f"channel size mismatch: {type(self).__name__} has in_channels="
                f"{self.in_channels}; got features {tuple(features.shape)}."
            )
        if features.dtype != weight.dtype and not torch.is_autocast_enabled(features.device.type):
            features = features.to(weight.dtype)
        return features, weight

    def _matrices(self, weight: Tensor) -> Tensor:
        """Return the matrix of each tap, a view ``[V, in, out]``.

        The memory of a 1x1 layer's weight is read as ``[in, out]``, as in spconv. If ``in != out``,
        that is a reinterpretation, not a transpose, of ``[out, 1, .., 1, in]``; published
        checkpoints were trained with it.
        """
        if self.conv1x1:
            return weight.reshape(1, self.in_channels, self.out_channels)
        return weight.flatten(1, -2).permute(1, 2, 0)

    def _convolve(
        self,
        features: Tensor,
        weight: Tensor,
        kernel_map: KernelMap,
        repeats: RepeatedSites | None,
        residual: Tensor | None,
        norm: Norm | None,
        relu: bool,
    ) -> Tensor:
        """Convolve along a kernel map, or over rows that share sites."""
        precision = "tf32" if constants.SPCONV_ALLOW_TF32 else "ieee"
        relu = relu or self.act_type is Activation.ReLU
        if repeats is None:
            if self.conv1x1:
                weight, layout = self._matrices(weight), "VIO"
            else:
                layout = "OVI"
            return convolve(
                features, weight, kernel_map, self.bias, precision, norm, relu,
                weight_layout=layout, residual=residual,
            )  # fmt: skip
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
        if self.bias is not None:
            # Expanded before it is rounded, so that its gradient is summed in its own dtype.
            feats = feats + self.bias.expand_as(feats).to(feats.dtype)
        return normalise(feats, norm, relu, residual)

    def _pointwise(self, features: Tensor, weight: Tensor) -> Tensor:
        """Convolve row by row, without a kernel map."""
        return ops.pointwise_conv(features, self._matrices(weight)[0], self.bias)

    @property
    def is_linear(self) -> bool:
        """Whether the layer has no activation; see :func:`tritonspconv.fuse`."""
        return self.act_type is Activation.None_

    def fold_scale_shift(self, scale: Tensor, shift: Tensor) -> None:
        """Make the output ``scale * output + shift``; see :func:`tritonspconv.fuse`."""
        weight = self.weight.detach()
        bias = 0 if self.bias is None else self.bias.detach() * scale
        # The matrices are a view of the memory.
        scaled = weight.clone(memory_format=torch.contiguous_format)
        self._matrices(scaled).mul_(scale)
        self.weight = nn.Parameter(scaled)
        self.bias = nn.Parameter((bias + shift).to(weight.dtype))

    def fold_relu(self) -> None:
        """Make the output ``relu(output)``; see :func:`tritonspconv.fuse`."""
        self.act_type = Activation.ReLU

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load; a weight in ``SAVED_WEIGHT_LAYOUT`` is converted."""
        from_axis = {"RSCK": -1, "RSKC": -2}.get(constants.SAVED_WEIGHT_LAYOUT)
        saved = state_dict.get(prefix + "weight")
        if from_axis is not None and saved is not None:
            state_dict[prefix + "weight"] = saved.movedim(from_axis, 0).contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


LAYER_FAMILY = LayerFamily(
    SparseConvTensor,
    "_features",
    convs=(SparseConvolution,),
    norms=dict.fromkeys((nn.BatchNorm1d, nn.SyncBatchNorm, SparseBatchNorm, SparseSyncBatchNorm)),
    relus=dict.fromkeys((nn.ReLU, SparseReLU)),
    containers=(nn.Sequential, SparseSequential),
)
