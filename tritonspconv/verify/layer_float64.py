"""Compute captured convolutions again on the CPU in float64, and compare."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tritonspconv import ops
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.kernel_map import KernelMap, kernel_map
from tritonspconv.verify.layer_capture import LayerCapture, MapSource

# Results with a row per voxel, in the dtype of the products; and sums over all voxels.
ROUNDED = ("output", "grad input")
SUMMED = ("grad weight", "grad bias")


@dataclass
class LayerResult:
    """The distance of one layer from float64.

    Attributes:
        name: Name of the layer.
        pointwise: It is 1x1, a plain matrix product.
        voxels: Output voxels.
        pairs: Size of the kernel map.
        same_sites: The CPU finds the same output voxels in the same order.
        errors: Relative error of each result.
        limits: The largest error allowed of each.
    """

    name: str
    pointwise: bool
    voxels: int
    pairs: int
    same_sites: bool
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True if sites and all errors are right; NaN is not right."""
        return self.same_sites and all(
            error <= self.limits[name] for name, error in self.errors.items()
        )


class CpuMaps:
    """Kernel maps built on the CPU, once for all layers on the same sites.

    Where the sites of both are equal, the CPU's own sites replace the sites of the device.
    """

    def __init__(self) -> None:
        # The coordinates are kept beside the sites, so that no other tensor gets their id.
        self._sites: dict[tuple[int, Grid], tuple[Tensor, ActiveSites]] = {}

    def find(self, source: MapSource) -> KernelMap:
        """Return the map that the CPU builds from the geometry's input sites."""
        key = (id(source.in_coords), source.in_grid)
        if key not in self._sites:
            sites = ActiveSites(source.in_coords.cpu(), source.in_grid)
            self._sites[key] = (source.in_coords, sites)
        sites = self._sites[key][1]
        submanifold = source.geometry.sites == "same"
        out_grid = None if submanifold else source.out_grid
        found = kernel_map(sites, source.geometry, out_grid=out_grid)
        if torch.equal(found.out_sites.coords, source.out_coords.cpu()):
            out_key = (id(source.out_coords), source.out_grid)
            self._sites.setdefault(out_key, (source.out_coords, found.out_sites))
        return found.inverse() if source.inverse else found


def check_layer(layer: LayerCapture, maps: CpuMaps) -> LayerResult:
    """Compute a layer in float64 and compare."""
    tensors, pointwise = layer.tensors, layer.source is None
    if layer.source is None:
        found, sites, pairs = None, tensors["sites"], len(tensors["input"])
    else:
        found = maps.find(layer.source)
        sites, pairs = found.out_sites.coords, found.num_pairs()
    result = LayerResult(
        layer.name,
        pointwise,
        len(tensors["output"]),
        pairs,
        same_sites=torch.equal(sites, tensors["output sites"]),
        limits=_limits(tensors["output"].dtype, pointwise),
    )
    if result.same_sites:
        exact = _exact(layer.module, tensors, found)
        worst_rows = []
        for name, value in exact.items():
            result.errors[name] = relative_error(tensors[name], value)
            if name in ROUNDED:
                worst_rows.append(_worst_row(tensors[name], value))
        result.errors["worst row"] = worst(worst_rows)
    return result


def _exact(module: Any, tensors: dict[str, Tensor], found: KernelMap | None) -> dict[str, Tensor]:
    """Return output and gradients in float64; without a map, of a 1x1 layer."""
    dtype = tensors["output"].dtype
    feats = tensors["input"].double().requires_grad_()
    weight = module.weight.detach().cpu().to(dtype).double().requires_grad_()
    inputs = {"grad input": feats, "grad weight": weight}
    bias = None
    if module.bias is not None:
        bias = module.bias.detach().cpu()
        # torch's product rounds the bias like its other operands; the engine adds it in float32.
        bias = (bias.to(dtype) if found is None else bias).double().requires_grad_()
        inputs["grad bias"] = bias
    if found is None:
        # spconv reads the memory of a 1x1 weight as [in, out].
        out = feats @ weight.reshape(module.in_channels, module.out_channels)
        out = out if bias is None else out + bias
    else:
        out = ops.sparse_conv(feats, weight.flatten(1, -2).permute(1, 2, 0), found, bias)
    grads = torch.autograd.grad(out, list(inputs.values()), tensors["grad output"].double())
    return {"output": out.detach()} | dict(zip(inputs, grads, strict=True))


def _limits(dtype: torch.dtype, pointwise: bool) -> dict[str, float]:
    """Return the tolerance of each result; the help of the command gives the reasons."""
    if dtype == torch.float32:
        summed = dict.fromkeys(SUMMED, 2e-6)
        return {"output": 1e-6, "grad input": 2e-6, "worst row": 1e-5, **summed}
    rounded = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    summed = dict.fromkeys(SUMMED, rounded if pointwise else 1e-4)
    return {**dict.fromkeys((*ROUNDED, "worst row"), rounded), **summed}


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference divided by the norm of ``exact``."""
    difference, size = (value.double() - exact).norm().item(), exact.norm().item()
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / size


def _worst_row(value: Tensor, exact: Tensor) -> float:
    """Return the largest error of a row over its norm, or over the rows' RMS norm if larger."""
    if not len(exact) or not exact.any():
        return relative_error(value, exact)
    sizes = exact.norm(dim=1)
    typical = sizes.square().mean().sqrt()
    return ((value.double() - exact).norm(dim=1) / sizes.clamp(min=typical)).max().item()


def worst(values: Iterable[float]) -> float:
    """Return the largest value; NaN counts as the largest."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)
