"""Run one chain of an optimised ``forward``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tritonspconv.kernels.channel_norm import TrainingNorm
from tritonspconv.nn.blocks.chains import Chain, Stage
from tritonspconv.nn.blocks.guards import find
from tritonspconv.nn.chain import trains_on
from tritonspconv.nn.fusable import FusableConv, LayerFamily, Norm, norm_numbers


class FusedStep:
    """A chain as one call: fused if the current state allows it, else module by module.

    The step holds no module. It looks its modules up at every call, so that they may be replaced,
    hooked, frozen or switched to training at any time, and so that copies of a model can share it.

    Args:
        chain: The chain.
        family: The layers that may be fused.
    """

    def __init__(self, chain: Chain, family: LayerFamily) -> None:
        self._family = family
        self._conv = chain.conv
        self._stages = tuple(chain.stages)
        by_kind = {stage.kind: stage for stage in chain.stages}
        self._norm, self._add, self._relu = map(by_kind.get, ("norm", "add", "relu"))
        self.__name__ = "fused_" + "_".join(chain.conv)

    def __call__(self, root: nn.Module, input: Any, other: Any = None) -> Any:
        """Return the result of the chain.

        Args:
            root: The module whose ``forward`` is optimised.
            input: The input of the convolution.
            other: The tensor that the chain adds; None: it adds nothing.
        """
        family = self._family
        if isinstance(input, family.tensor):
            conv = family.conv(find(root, self._conv))
            if conv is not None:
                done, value = self._fused(root, conv, input, other)
                return self._apart(root, self._stages[done:], value, other)
        value = find(root, self._conv)(input)
        return self._apart(root, self._stages, value, other)

    def _fused(self, root: nn.Module, conv: FusableConv, input: Any, other: Any) -> tuple[int, Any]:
        """Run the convolution and the stages that can be fused: return their number, the result."""
        family, norm, done = self._family, None, 0
        if self._norm is not None:
            norm = self._numbers(root, conv, input)
            done = norm is not None
        if norm is not None or (self._norm is None and not torch.is_grad_enabled()):
            residual = None
            if self._add is not None:
                residual = self._residual(conv, input, other)
                done += residual is not None
            relu = (
                self._relu is not None
                and (self._add is None or residual is not None)
                and (self._relu.path is None or family.is_relu(find(root, self._relu.path)))
            )
            done += relu
            if done:
                return done, conv.forward_fused(input, norm, relu, residual)
        return 0, find(root, self._conv)(input)

    def _numbers(self, root: nn.Module, conv: FusableConv, input: Any) -> Norm | None:
        assert self._norm is not None
        assert self._norm.path is not None
        family = self._family
        module = family.batch_norm(find(root, self._norm.path))
        norm = None if module is None else norm_numbers(module, conv.out_channels)
        if isinstance(norm, TrainingNorm) and not trains_on(family.features(input).device):
            return None
        return norm

    def _residual(self, conv: FusableConv, input: Any, other: Any) -> Tensor | None:
        """Return the features to add, or None where the code's own addition has to run."""
        assert self._add is not None
        if not self._add.on_features:
            residual = conv.residual_of(input, other)
        else:
            residual = other if isinstance(other, Tensor) else None
        if self._add.in_place and residual is not None:
            # An in-place addition keeps the dtype of the output; the addition of our kernel
            # promotes.
            same = residual.dtype == _output_dtype(conv, self._family.features(input))
            return residual if same else None
        return residual

    def _apart(self, root: nn.Module, stages: tuple[Stage, ...], value: Any, other: Any) -> Any:
        """Run stages one by one, as the code does."""
        for stage in stages:
            operand = self._family.features(value) if stage.on_features else value
            if stage.path is not None:
                result = find(root, stage.path)(operand)
            elif stage.kind == "add":
                assert stage.call is not None
                pair = (other, operand) if stage.residual_first else (operand, other)
                result = stage.call(*pair)
            else:
                assert stage.call is not None
                result = stage.call(operand)
            if stage.on_features:
                result = self._family.with_features(value, result)
            value = result
        return value


def _output_dtype(conv: Any, feats: Tensor) -> torch.dtype | None:
    """Return the dtype of the convolution's output; None: it depends on the library."""
    device_type = feats.device.type
    if torch.is_autocast_enabled(device_type) and feats.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    weight = next(iter(conv._parameters.values()), None)
    return feats.dtype if weight is not None and weight.dtype == feats.dtype else None
