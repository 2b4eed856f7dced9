"""The base of convolution layers: parameters, one call, and the interface of fusion."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from tritonspconv.arguments import whole_number
from tritonspconv.graph_capture import run_untraced
from tritonspconv.guide import more
from tritonspconv.kernel_map import KernelMap
from tritonspconv.nn._family import LAYER_FAMILY
from tritonspconv.nn._module import SparseModule
from tritonspconv.nn.chain import convolve
from tritonspconv.nn.fusable import LayerFamily, Norm
from tritonspconv.ops.conv import Precision
from tritonspconv.sparse_tensor import SparseTensor

if TYPE_CHECKING:
    from jaxtyping import Float


class Conv(SparseModule):
    """Weight [V, c_in, c_out] and bias [c_out] of a window of ``ndim`` axes."""

    ndim: ClassVar[int]
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        bias: bool,
        precision: Precision,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.in_channels = whole_number(f"{name}: in_channels", in_channels, least=1)
        self.out_channels = whole_number(f"{name}: out_channels", out_channels, least=1)
        self.kernel_size = kernel_size
        self.precision: Precision = precision
        self.relu = False
        shape = (math.prod(kernel_size), self.in_channels, self.out_channels)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        made = torch.empty(self.out_channels, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if made is None else nn.Parameter(made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch's dense layers do: uniform within 1 / sqrt(fan in)."""
        # kaiming_uniform_(a=sqrt(5)) would take a wrong fan in from this layout of the weight.
        bound = 1 / math.sqrt(self.in_channels * self.weight.shape[0])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def _map(self, x: SparseTensor, like: SparseTensor | None = None) -> KernelMap:
        """Return the kernel map from ``x``; see ``forward``."""
        raise NotImplementedError

    def _convolve(
        self,
        x: SparseTensor,
        like: SparseTensor | None = None,
        norm: Norm | None = None,
        relu: bool = False,
        residual: Tensor | None = None,
    ) -> SparseTensor:
        try:
            kmap = self._map(x, like)
            feats = convolve(
                x.feats, self.weight, kmap, self.bias, self.precision, norm, relu or self.relu,
                residual=residual,
            )  # fmt: skip
        except (AttributeError, ValueError):
            # The check runs only after a failure, so a correct call takes no time for it.
            self._check_inputs(x, like)
            raise
        return SparseTensor(feats, kmap.out_sites)

    def _check_inputs(self, x: object, like: object) -> None:
        """Raise an error that names the layer, if its inputs do not fit."""
        name = type(self).__name__
        for value in (x,) if like is None else (x, like):
            if not isinstance(value, SparseTensor):
                raise TypeError(
                    f"{name} takes a SparseTensor; got {type(value).__name__}. Make one with "
                    "tritonspconv.SparseTensor(feats, coords)." + more("sparse-input")
                )
        assert isinstance(x, SparseTensor)
        if x.channels != self.in_channels:
            raise ValueError(
                f"{name} has in_channels={self.in_channels}; got {x}. Build the layer with "
                f"in_channels={x.channels}."
            )

    def layer_family(self) -> LayerFamily:
        """Return the layers that this convolution may be fused with."""
        return LAYER_FAMILY

    def forward_fused(
        self,
        input: SparseTensor,
        norm: Norm | None,
        relu: bool,
        residual: Float[Tensor, "n_out c_out"] | None = None,
    ) -> SparseTensor:
        """Convolve, normalise, add ``residual`` [n_out, c_out] and clamp, in that order."""
        return self._convolve(input, None, norm, relu, residual)

    def trace_fused(self, input: SparseTensor, norm: Norm | None, relu: bool) -> SparseTensor:
        """Convolve, normalise and clamp, where ``torch.compile`` traces: the graph breaks."""
        return run_untraced(self._convolve, input, None, norm, relu)

    def _takes(self, x: object) -> bool:
        """Return whether a registered operator takes ``x``: features of one row for each site."""
        return (
            isinstance(x, SparseTensor)
            and x.sites.bounds is None
            and type(x.feats) is Tensor
            and x.channels == self.in_channels
        )

    def residual_of(
        self, input: SparseTensor, other: object
    ) -> Float[Tensor, "n_out c_out"] | None:
        """Return the features of ``other`` if it has the output's sites for certain, else None."""
        return None

    @property
    def is_linear(self) -> bool:
        """True unless :meth:`fold_relu` was called."""
        return not self.relu

    def fold_scale_shift(
        self, scale: Float[Tensor, "c_out"], shift: Float[Tensor, "c_out"]
    ) -> None:
        """Make the output ``scale * output + shift``; see :func:`tritonspconv.fuse`."""
        bias = 0 if self.bias is None else self.bias.detach() * scale
        self.weight = nn.Parameter((self.weight.detach() * scale).to(self.weight.dtype))
        self.bias = nn.Parameter((bias + shift).to(self.weight.dtype))

    def fold_relu(self) -> None:
        """Make the output ``relu(output)``; see :func:`tritonspconv.fuse`."""
        self.relu = True

    def extra_repr(self) -> str:
        """Return channels, window and settings that differ from the defaults."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        geometry = getattr(self, "geometry", None)
        if geometry is not None:
            for name, default in (
                ("stride", 1),
                ("padding", 0),
                ("dilation", 1),
                ("output_padding", 0),
            ):
                value = getattr(geometry, name)
                implied = name == "padding" and geometry.sites == "same"
                if any(entry != default for entry in value) and not implied:
                    text += f", {name}={value}"
            if geometry.sites == "cells":
                text += ", sites='cells'"
        if self.bias is None:
            text += ", bias=False"
        if self.relu:
            text += ", relu=True"
        return text if self.precision == "ieee" else f"{text}, precision={self.precision!r}"
