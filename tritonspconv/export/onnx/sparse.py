"""Operations of the engine on rows, as nodes of the domain ``tritonspconv``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonspconv.coords import ActiveSites
from tritonspconv.coords.row_tensor import RowBounds, plain
from tritonspconv.export.onnx.graph import DOMAIN
from tritonspconv.export.onnx.operands import operand
from tritonspconv.export.onnx.products import norm_node, product
from tritonspconv.export.onnx.trace import Kwargs, Recorder, Rule
from tritonspconv.export.onnx.values import Args, Function, Rows
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import KernelMap, output_sites
from tritonspconv.kernels.channel_norm import ChannelNorm
from tritonspconv.ops.channelwise import sparse_channelwise_conv
from tritonspconv.ops.conv import sparse_conv
from tritonspconv.ops.dense import to_dense
from tritonspconv.ops.global_pool import global_broadcast, global_pool
from tritonspconv.ops.pointwise import pointwise_conv
from tritonspconv.ops.pool import sparse_pool


@dataclass
class SiteSet:
    """Coordinates that the graph has a value for.

    Attributes:
        name: The value, int32 [N, 1 + D].
        coords: The coordinates of the example.
        bounds: The object that represents the set in the recorded run.
    """

    name: str
    coords: Tensor
    bounds: RowBounds


def _site_set(recorder: Recorder, sites: ActiveSites) -> SiteSet | None:
    """Return the value of coordinates; None if the graph has none yet."""
    bounds = sites.bounds
    if bounds is None:
        return recorder.refuse("runs at coordinates that do not come from the network's input")
    found = recorder.site_sets.get(id(bounds))
    if found is None:
        for name, value, owner in recorder.integers:
            if owner is bounds and value.shape == sites.coords.shape:
                if value.dtype == torch.int32 and torch.equal(value, sites.coords):
                    found = SiteSet(name, sites.coords, bounds)
                    break
                if value.dtype == torch.int64 and torch.equal(value.int(), sites.coords):
                    cast = recorder.emit("Cast", [name], {"to": torch.int32})
                    found = SiteSet(cast, sites.coords, bounds)
                    break
        if found is None:
            return None
        recorder.site_sets[id(bounds)] = found
    if not torch.equal(found.coords, sites.coords):
        recorder.refuse(
            "counts coordinates in other cells than the layer that made them: a tensor stride that "
            "does not divide them has no node here"
        )
    return found


def _known_set(recorder: Recorder, sites: ActiveSites) -> SiteSet:
    found = _site_set(recorder, sites)
    if found is None:
        return recorder.refuse("runs at coordinates that code of the network has computed")
    return found


def _relation(
    recorder: Recorder, kernel_map: KernelMap
) -> tuple[SiteSet, SiteSet | None, dict[str, Any]]:
    """Return the sites of a map's inputs and outputs, and its relation as attributes.

    The output sites are None if the node makes them by the rule of its geometry.
    """
    if kernel_map.is_listed:
        recorder.refuse("runs along pairs of rows that the network lists, which are of one scan")
    geometry, inverse = kernel_map.geometry, kernel_map.is_inverse
    source = _known_set(recorder, kernel_map.in_sites)
    target = _site_set(recorder, kernel_map.out_sites)
    if target is None:
        _expect_made(recorder, kernel_map)
    grids = kernel_map.in_sites.grid, kernel_map.out_sites.grid
    attributes: dict[str, Any] = {
        "ndim": geometry.ndim,
        "kernel_size": list(geometry.kernel_size),
        "stride": list(geometry.stride),
        "padding": list(geometry.padding),
        "dilation": list(geometry.dilation),
        "output_padding": list(geometry.output_padding),
        "subm": int(geometry.sites == "same" and target is source),
        "transposed": int(geometry.transposed),
        "inverse": int(inverse),
        "sites": geometry.sites,
    }
    if geometry.taps:
        attributes["taps"] = [x for tap in geometry.taps for x in tap]
    for side, grid in zip(("input", "output"), grids, strict=True):
        recorder.note_grid(grid)
        if grid.bounded:
            attributes[f"{side}_spatial_shape"] = list(grid.shape)
    attributes["indice_key"] = _indice_key(recorder, kernel_map)
    return source, target, attributes


def _indice_key(recorder: Recorder, kernel_map: KernelMap) -> str:
    """Return a name for a relation: the layer's own, unless another relation has that name."""
    ends = [kernel_map.in_sites, kernel_map.out_sites]
    bounds = [id(sites.bounds) for sites in (ends[::-1] if kernel_map.is_inverse else ends)]
    relation = (*bounds, kernel_map.geometry)
    key = recorder.indice_keys.get(relation)
    if key is None:
        wanted = getattr(recorder.module, "indice_key", None)
        taken = set(recorder.indice_keys.values())
        key = wanted if isinstance(wanted, str) else f"map{len(taken)}"
        while key in taken:
            key = f"{key}_{len(taken)}"
        recorder.indice_keys[relation] = key
    return key


def _expect_made(recorder: Recorder, kernel_map: KernelMap) -> None:
    """Raise unless the rule of its geometry makes the output sites of a map."""
    sites, made, geometry = kernel_map.in_sites, kernel_map.out_sites, kernel_map.geometry
    if not kernel_map.is_inverse and geometry.sites != "same":
        again = output_sites(
            ActiveSites(sites.coords, sites.grid), geometry,
            made.grid if made.grid.bounded else None,
        )  # fmt: skip
        if torch.equal(again.coords, made.coords):
            return
    recorder.refuse("writes sites that its window does not make, for which there is no node here")


def _emit(
    recorder: Recorder, op: str, inputs: list[str], kernel_map: KernelMap, out: Tensor, **more: Any
) -> Rows:
    """Add the node of a layer along a kernel map."""
    _, target, attributes = relation = _relation(recorder, kernel_map)
    attributes |= more
    source = relation[0]
    inputs.insert(1, source.name)
    extra: tuple[str, ...] = ()
    bounds = kernel_map.out_sites.bounds
    assert bounds is not None
    if target is None:
        indices = recorder.fresh("indices")
        made = kernel_map.out_sites.coords
        recorder.site_sets[id(bounds)] = SiteSet(indices, made, bounds)
        recorder.integers.append((indices, made, bounds))
        extra = (indices,)
    elif not attributes["subm"]:
        inputs += [""] * (4 - len(inputs)) if op == "SparseConvolution" else []
        inputs.append(target.name)
    name = recorder.emit(op, inputs, attributes, domain=DOMAIN, extra_outputs=extra)
    return recorder.rows(out, name, bounds)


def spconv_weight(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return matrices [V, c_in, c_out] in the layout of spconv, [c_out, *kernel_size, c_in].

    A window of single taps has [c_out, V, c_in].
    """
    _, c_in, c_out = weight.shape
    if geometry.taps:
        return weight.permute(2, 0, 1)
    size = geometry.kernel_size
    if geometry.tap_order == "first_axis_fastest":
        axes = range(len(size) - 1, -1, -1)
        weight = weight.reshape(*size[::-1], c_in, c_out).permute(*axes, -2, -1)
    else:
        weight = weight.reshape(*size, c_in, c_out)
    return weight.movedim(-1, 0)


def _conv(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    feats, weight, kernel_map, bias = args
    norm, residual, relu = kwargs["norm"], kwargs["residual"], kwargs["relu"]
    if torch.is_autocast_enabled(feats.device.type):
        recorder.refuse("runs under autocast. Convert the network to one dtype instead")
    for vector in (weight, *(() if bias is None else (bias,))):
        recorder.expect_constant(vector)
    plain_kwargs = {**kwargs, "norm": None, "residual": None, "relu": False}
    out = recorder.run(func, args, plain_kwargs)
    matrices = weight
    if kwargs["weight_layout"] == "OVI":
        matrices = weight.flatten(1, -2).permute(1, 2, 0)
    geometry = kernel_map.geometry
    path = f"{recorder.path}.weight" if recorder.path else "weight"
    layout = (geometry.kernel_size, geometry.tap_order, geometry.taps)
    key = ("spconv", recorder.identity(weight), layout, out.dtype)
    name = recorder.constant(spconv_weight(matrices, geometry).to(out.dtype), path, key)
    inputs = [operand(recorder, feats, out.dtype), name]
    if bias is not None:
        inputs.append(recorder.parameter(bias, out.dtype, flat=True))
    made = _emit(
        recorder, "SparseConvolution", inputs, kernel_map, out,
        in_channels=matrices.shape[1], out_channels=matrices.shape[2],
    )  # fmt: skip
    return _epilogue(recorder, made, norm, residual, relu)


def _epilogue(recorder: Recorder, x: Rows, norm: Any, residual: Any, relu: bool) -> Rows:
    """Record the operations of a layer on its sums: batch norm, addition, ReLU."""
    out: Any = x
    if norm is not None:
        if not isinstance(norm, ChannelNorm):
            recorder.refuse("normalises by the statistics of the scan. Call model.eval()")
        mean, variance, weight, bias, eps = norm
        vectors = [None if v is None else v.to(out.dtype) for v in (mean, variance, weight, bias)]
        value = torch.nn.functional.batch_norm(plain(out), *vectors, eps=eps)  # pyright: ignore
        name = norm_node(
            recorder, recorder.name_of(out), (mean, variance, weight, bias), eps, out.dtype
        )
        out = recorder.rows(value, name, out.bounds)
    if residual is not None:
        out = out + residual
    return torch.relu(out) if relu else out  # pyright: ignore[reportReturnType]


def _pointwise(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    feats, weight, bias = args
    if torch.is_autocast_enabled(feats.device.type):
        recorder.refuse("runs under autocast. Convert the network to one dtype instead")
    out = recorder.run(func, args, kwargs)
    return product(recorder, feats, weight, bias, out, transposed=False)


def _pool(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    feats, kernel_map, *rest = args
    mode = rest[0] if rest else kwargs.get("mode", "max")
    out = recorder.run(func, args, kwargs)
    more = {"mode": mode}
    if kwargs.get("floor") is not None:
        more["floor"] = float(kwargs["floor"])
    return _emit(recorder, "SparsePool", [recorder.name_of(feats)], kernel_map, out, **more)


def _dense(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    feats, sites = args
    if not sites.grid.bounded:
        recorder.refuse(
            "makes a dense tensor of an unbounded grid, whose shape differs from scan to scan"
        )
    recorder.note_grid(sites.grid)
    out = recorder.run(func, args, kwargs)
    inputs = [recorder.name_of(feats), _known_set(recorder, sites).name]
    attributes = {
        "spatial_shape": list(sites.grid.shape),
        "batch_size": sites.grid.batch_size,
        "channels": feats.shape[1],
        "channels_first": int(kwargs.get("channels_first", True)),
    }
    name = recorder.emit("SparseToDense", inputs, attributes, domain=DOMAIN)
    return recorder.dense.enter(recorder, out, name)


def _global_pool(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    feats, batch_index, batch_size, *rest = args
    mode = rest[0] if rest else kwargs.get("mode", "avg")
    if not isinstance(batch_index, Rows) or not isinstance(feats, Rows):
        recorder.refuse("pools over samples that do not come from the network's input")
    out = recorder.run(func, args, kwargs)
    inputs = [recorder.name_of(feats), recorder.name_of(batch_index)]
    attributes = {"mode": mode, "batch_size": int(batch_size)}
    name = recorder.emit("SparseGlobalPool", inputs, attributes, domain=DOMAIN)
    return recorder.dense.enter(recorder, out, name)


def _no_node(what: str) -> Rule:
    def rule(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
        recorder.refuse(f"is {what}, for which there is no node")

    return rule


def sparse_rules() -> dict[Function, Rule]:
    """Return the rules of the engine's operations."""
    return {
        sparse_conv: _conv,
        pointwise_conv: _pointwise,
        sparse_pool: _pool,
        to_dense: _dense,
        global_pool: _global_pool,
        sparse_channelwise_conv: _no_node("a channelwise convolution"),
        global_broadcast: _no_node("a broadcast of one row for each sample"),
    }
