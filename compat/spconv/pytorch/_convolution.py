"""The base of spconv's convolutions; parameters are ``weight [out, *k, in]`` and ``bias``."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compat.spconv import constants
from compat.spconv.core import Activation, ConvAlgo
from compat.spconv.pytorch._convolution_base import IntOrInts, SparseConvolutionBase
from compat.spconv.pytorch._family import LAYER_FAMILY
from compat.spconv.pytorch._traced import trace_convolution
from compat.spconv.pytorch._voxel_count import CountsVoxels
from compat.spconv.pytorch.core import SparseConvTensor
from tritonspconv.graph_capture import is_traced, run_untraced
from tritonspconv.nn.fusable import LayerFamily, Norm


class SparseConvolution(SparseConvolutionBase, CountsVoxels):
    """Base of all sparse convolutions.

    Args:
        ndim: Number of spatial axes.
        in_channels, out_channels: Channels.
        kernel_size, stride, padding, dilation: An int, or one int per axis. A submanifold layer
            takes ``stride`` and ``padding`` and ignores them, as spconv does.
        groups: Must be 1.
        bias: True: the layer learns a bias.
        subm: Submanifold: outputs at the input sites; odd kernel sizes only.
        output_padding: Extra extent of a transposed output.
        transposed, inverse: Transposed convolution; inverse of the layer that recorded the key.
        indice_key: Name under which the kernel map travels downstream in ``indice_dict``.
        algo: Label that layers of one key must share; no result depends on it. Default: spconv's.
        fp32_accum: Accepted; products are always accumulated in float32.
        record_voxel_count: Keep the largest number of output sites in the buffer
            ``max_num_voxels_during_training``; not of submanifold and inverse layers.
        act_type, act_alpha, act_beta: Activation of the output; ``act_alpha`` is LeakyReLU's slope.
        large_kernel_fast_algo: True: spconv's default ``algo`` is an implicit GEMM up to 128 taps;
            False: up to 32.
        name: Kept as an attribute.
        device, dtype: Device and dtype of the parameters.

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
        CountsVoxels.__init__(self, name=name)
        SparseConvolutionBase.__init__(
            self, ndim, in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            bias, subm, output_padding, transposed, inverse, indice_key, algo, fp32_accum,
            record_voxel_count, act_type, act_alpha, act_beta, large_kernel_fast_algo,
        )  # fmt: skip
        self.weight = nn.Parameter(torch.empty(self.weight_shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        if not subm and not inverse:
            self._init_voxel_count(device)
        self.reset_parameters()

    __constants__: ClassVar[list[str]] = [
        "stride", "padding", "dilation", "groups", "bias", "subm", "inverse", "transposed",
        "output_padding",
    ]  # fmt: skip

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly from ``+-1 / sqrt(in_channels * kernel volume)``."""
        self._custom_kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            fan_in, _ = self._calculate_fan_in_and_fan_out()
            bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    def _calculate_fan_in_and_fan_out(self) -> tuple[int, int]:
        """Return how many inputs an output has, and how many outputs an input."""
        volume = math.prod(self.kernel_size)
        return self.in_channels * volume, self.out_channels * volume

    def _calculate_correct_fan(self, mode: str) -> int:
        """Return the fan that ``mode``, ``"fan_in"`` or ``"fan_out"``, names."""
        if mode.lower() not in ("fan_in", "fan_out"):
            raise ValueError(f"mode must be 'fan_in' or 'fan_out'; got {mode!r}.")
        fan_in, fan_out = self._calculate_fan_in_and_fan_out()
        return fan_in if mode.lower() == "fan_in" else fan_out

    def _custom_kaiming_uniform_(
        self,
        tensor: Tensor,
        a: float = 0,
        mode: str = "fan_in",
        nonlinearity: str = "leaky_relu",
    ) -> Tensor:
        """Do as ``nn.init.kaiming_uniform_``, with the fans of this layer."""
        fan = self._calculate_correct_fan(mode)
        gain = nn.init.calculate_gain(nonlinearity, a)  # pyright: ignore[reportArgumentType]
        bound = math.sqrt(3.0) * gain / math.sqrt(fan) if fan else 0.0
        return nn.init.uniform_(tensor, -bound, bound)

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

    def forward(
        self, input: SparseConvTensor, add_input: SparseConvTensor | None = None
    ) -> SparseConvTensor:
        """Convolve.

        Args:
            input: Features ``[N, in_channels]`` at active sites.
            add_input: Added to the output row by row, before the activation.
        """
        if is_traced():
            out = trace_convolution(self, input, add_input)
            return run_untraced(self.forward, input, add_input) if out is None else out
        return self._conv_forward(
            self.training, input, self.weight, self.bias, add_input,
            name=self.name, sparse_unique_name=self._sparse_unique_name,
            act_type=self.act_type, act_alpha=self.act_alpha, act_beta=self.act_beta,
        )  # fmt: skip

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
        return self._run(
            input, self.weight, self.bias, residual, self.act_type, self.act_alpha, norm, relu
        )

    def trace_fused(
        self, input: SparseConvTensor, norm: Norm | None, relu: bool
    ) -> SparseConvTensor:
        """Convolve, normalise and clamp, in operations that ``torch.compile`` traces."""
        out = trace_convolution(self, input, None, norm, relu)
        return run_untraced(self.forward_fused, input, norm, relu) if out is None else out

    def residual_of(self, input: SparseConvTensor, other: Any) -> Tensor | None:
        """Return the features of ``other``: spconv's addition does not compare coordinates."""
        return other.features if isinstance(other, SparseConvTensor) else None

    @property
    def is_linear(self) -> bool:
        """True if the layer has no activation, and ``_conv_forward`` is not replaced.

        :func:`tritonspconv.fuse` leaves other layers as they are.
        """
        return self.act_type is Activation.None_ and self.has_own_methods()

    def has_own_methods(self) -> bool:
        """Return whether no user replaced ``_conv_forward`` or a copy method of the tensor."""
        return (
            type(self)._conv_forward is _CONV_FORWARD
            and "_conv_forward" not in self.__dict__
            and SparseConvTensor.shadow_copy is _SHADOW_COPY
            and SparseConvTensor.replace_feature is _REPLACE_FEATURE
        )

    def has_own_checks(self) -> bool:
        """Return whether no user replaced the checks of a shared ``indice_key``."""
        kind, own = type(self), self.__dict__
        return (
            kind._check_subm_reuse_valid is _CHECK_SUBM
            and kind._check_inverse_reuse_valid is _CHECK_INVERSE
            and "_check_subm_reuse_valid" not in own
            and "_check_inverse_reuse_valid" not in own
        )

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

    def _load_weight_different_layout(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Convert a saved weight from the layout ``constants.SAVED_WEIGHT_LAYOUT``."""
        from_axis = {"RSCK": -1, "RSKC": -2}.get(constants.SAVED_WEIGHT_LAYOUT)
        saved = state_dict.get(prefix + "weight")
        if from_axis is not None and saved is not None:
            state_dict[prefix + "weight"] = saved.movedim(from_axis, 0).contiguous()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load. If a weight has an older layout, the error says how to convert the checkpoint."""
        args = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        self._load_weight_different_layout(state_dict, prefix, *args)
        known = len(error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *args)
        saved = state_dict.get(prefix + "weight")
        if len(error_msgs) > known and isinstance(saved, Tensor):
            hint = self._layout_hint(tuple(saved.shape))
            error_msgs[known:] = [
                message + hint if f"{prefix}weight:" in message else message
                for message in error_msgs[known:]
            ]

    def _layout_hint(self, saved: tuple[int, ...]) -> str:
        """Return advice about a weight of shape ``saved``; "" if it has no older layout."""
        out, *kernel, inner = self.weight.shape
        # If the numbers of channels are equal, a shape fits both.
        older = [
            text
            for shape, text in (
                ((*kernel, inner, out), "spconv 1.x and mmcv, [*kernel, in, out]"),
                ((*kernel, out, inner), "spconv 2.0 and 2.1, [*kernel, out, in]"),
            )
            if shape == saved
        ]
        if not older:
            return ""
        return (
            f" The saved weight has the layout of {', or of '.join(older)}. Load the checkpoint "
            "with compat.spconv.checkpoint.load_state_dict, or convert the file with "
            "tritonspconv convert."
        )


_CONV_FORWARD = SparseConvolution._conv_forward
_CHECK_SUBM = SparseConvolution._check_subm_reuse_valid
_CHECK_INVERSE = SparseConvolution._check_inverse_reuse_valid
_SHADOW_COPY, _REPLACE_FEATURE = SparseConvTensor.shadow_copy, SparseConvTensor.replace_feature
