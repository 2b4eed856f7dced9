"""Copy the inputs and outputs of every sparse convolution in a training step to the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tritonspconv.coords import Grid
from tritonspconv.geometry import ConvGeometry


@dataclass(frozen=True)
class MapSource:
    """The sites and geometry that a kernel map was built from; holds the coordinates, not the map.

    Attributes:
        geometry: The relation.
        in_coords, in_grid: Sites on the side of the geometry's inputs.
        out_coords, out_grid: Sites on the side of its outputs.
        inverse: The layer runs the map from its outputs to its inputs.
    """

    geometry: ConvGeometry
    in_coords: Tensor
    in_grid: Grid
    out_coords: Tensor
    out_grid: Grid
    inverse: bool


@dataclass
class LayerCapture:
    """Record of a convolution in one step.

    Attributes:
        name: Name of the layer in the network.
        module: The layer.
        source: Source of its kernel map; None: the layer is 1x1 and works row by row.
        tensors: Tensors of the step, on the CPU. ``sites`` and ``output sites``: coordinates of
            both sides. ``input``: features, rounded to the dtype of the products as in the layer.
            ``output``, ``grad output``, ``grad input``, ``grad weight`` and, with a bias, ``grad
            bias``.
    """

    name: str
    module: Any
    source: MapSource | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


class StepRecorder:
    """Hooks on the sparse convolutions of ``network``, which stay on for its life.

    The first step is kept. Every tensor of a later step is compared with it and dropped.

    Args:
        spconv: The module that the network was built from.
        network: The network; no layer runs twice in a step.

    Attributes:
        changed: Tensors of later steps with other bits than in the first, in the order in which
            they were computed, as ``layer: tensor``.
    """

    def __init__(self, spconv: ModuleType, network: nn.Module) -> None:
        self.changed: list[str] = []
        self._layers: dict[str, LayerCapture] = {}
        for name, module in network.named_modules():
            if isinstance(module, spconv.conv.SparseConvolution):
                self._attach(LayerCapture(name, module))

    @property
    def layers(self) -> list[LayerCapture]:
        """The layers in the order in which they ran."""
        return list(self._layers.values())

    def keep(self, tensors: dict[str, Tensor], layer: str, name: str, tensor: Tensor) -> None:
        """Copy ``tensor`` to the CPU, or compare it with the copy of the first step."""
        copy = tensor.detach().to("cpu", copy=True)
        kept = tensors.setdefault(name, copy)
        if kept is not copy and not _same_bits(kept, copy):
            self.changed.append(f"{layer}: {name}")

    def _attach(self, layer: LayerCapture) -> None:
        module = layer.module

        def keep(name: str, tensor: Tensor) -> None:
            self.keep(layer.tensors, layer.name, name, tensor)

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            # Hook a separate view, because the gradient of a tensor that several layers read is
            # their sum.
            x = x.replace_feature(x.features.view_as(x.features))
            x.features.register_hook(lambda grad: keep("grad input", grad))
            return (x, *args[1:])

        def after(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self._layers.setdefault(layer.name, layer)
            layer.source = _map_source(module, out)
            keep("sites", args[0].indices)
            keep("output sites", out.indices)
            keep("input", args[0].features.to(out.features.dtype))
            keep("output", out.features)
            out.features.register_hook(lambda grad: keep("grad output", grad))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        for name, parameter in module.named_parameters(recurse=False):
            parameter.register_post_accumulate_grad_hook(
                lambda parameter, name=name: keep(f"grad {name}", parameter.grad)
            )


def _map_source(module: Any, out: Any) -> MapSource | None:
    if module.conv1x1 and not module.inverse:
        return None
    found = out.indice_dict[module.indice_key].kernel_map
    return MapSource(
        found.geometry,
        found.in_sites.coords,
        found.in_sites.grid,
        found.out_sites.coords,
        found.out_sites.grid,
        module.inverse,
    )


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Compare as bytes: equal NaNs are the same, but zeros of different sign are not."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
