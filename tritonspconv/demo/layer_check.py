"""Compare one layer of each kind, forward and backward, with the brute-force reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tritonspconv import reference

CHANNELS_IN, CHANNELS_OUT = 16, 24
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class CheckResult:
    """The distance of a layer from the reference.

    Attributes:
        layer: Name of the layer.
        rows: Output voxels.
        errors: Largest difference over the largest value: of the output, the gradient of the
            features, and the gradient of the weight (None for pooling).
        passed: The output voxels agree, and no error is above the tolerance of the dtype.
    """

    layer: str
    rows: int
    errors: tuple[float, float, float | None]
    passed: bool


def check_layers(
    spconv: ModuleType,
    indices: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    rows: int = 600,
) -> list[CheckResult]:
    """Run every kind of layer on a piece of a scan, and the reference in float64.

    Args:
        spconv: The module with the sparse layers.
        indices: Voxels of the scan, int ``[N, 4]``: batch, z, y, x.
        device: Device of the layers.
        dtype: Type of the features and the weights.
        rows: Voxels in the piece.
    """
    piece, shape = _piece(indices, rows)
    torch.manual_seed(0)
    feats = torch.randn(len(piece), CHANNELS_IN).to(device, dtype).requires_grad_()
    layers: list[tuple[str, Any, Callable[..., _Expected]]] = [
        ("SubMConv3d 3x3x3", _conv(spconv.SubMConv3d, 3, padding=1), _expect_submanifold),
        ("SparseConv3d 3x3x3 /2", _conv(spconv.SparseConv3d, 3, stride=2, padding=1), _expect_conv),
        (
            "SparseConvTranspose3d 3x3x3 /2",
            _conv(spconv.SparseConvTranspose3d, 3, stride=2, padding=1),
            _expect_conv,
        ),
        ("SparseMaxPool3d 2x2x2 /2", spconv.SparseMaxPool3d(2, 2, indice_key="pool"), _expect_pool),
    ]
    results = []
    for name, layer, expect in layers:
        x = spconv.SparseConvTensor(feats, piece.to(device), shape, 1)
        out = layer.to(device, dtype)(x)
        results.append(_compare(name, layer, feats, out, expect(layer, piece, shape, out)))

    strided = _conv(spconv.SparseConv3d, 3, stride=2, padding=1).to(device, dtype)
    inverse = spconv.SparseInverseConv3d(CHANNELS_OUT, CHANNELS_IN, 3, indice_key="check")
    coarse = strided(spconv.SparseConvTensor(feats, piece.to(device), shape, 1))
    coarse_feats = coarse.features.detach().requires_grad_()
    out = inverse.to(device, dtype)(coarse.replace_feature(coarse_feats))
    expected = _expect_conv(strided, piece, shape, coarse)
    expected.triples = [(o, i, tap) for i, o, tap in expected.triples]
    expected.sites = piece
    results.append(_compare("SparseInverseConv3d 3x3x3", inverse, coarse_feats, out, expected))
    return results


@dataclass
class _Expected:
    """Sites and kernel map of a layer as the reference sees them."""

    sites: Tensor
    triples: list[reference.Triple]
    pooled: bool = False


def _conv(kind: Callable[..., Any], kernel_size: int, **geometry: int) -> Any:
    return kind(CHANNELS_IN, CHANNELS_OUT, kernel_size, indice_key="check", **geometry)


def _piece(indices: Tensor, rows: int) -> tuple[Tensor, list[int]]:
    """Cut the voxels nearest to the median voxel of the first sample out of a scan."""
    sample = indices[indices[:, 0] == 0].cpu()
    middle = sample.median(dim=0).values
    nearest = (sample - middle).square().sum(dim=1).argsort()[:rows].sort().values
    piece = sample[nearest]
    piece = piece - piece.amin(dim=0)
    shape = (piece.amax(dim=0) + 1).clamp(min=4)[1:]
    return piece.to(torch.int32), shape.tolist()


def _expect_submanifold(layer: Any, piece: Tensor, shape: list[int], out: Any) -> _Expected:
    middle = [size // 2 for size in layer.kernel_size]
    ones = [1, 1, 1]
    triples = reference.relation(piece, piece, layer.kernel_size, ones, middle, ones)
    return _Expected(piece, triples)


def _expect_conv(layer: Any, piece: Tensor, shape: list[int], out: Any) -> _Expected:
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    transposed = bool(getattr(layer, "transposed", False))
    in_box = reference.Box((0, 0, 0), tuple(shape), 1)
    out_box = reference.Box((0, 0, 0), tuple(out.spatial_shape), 1)
    sites = reference.output_sites(
        piece, *geometry, transposed=transposed, in_box=in_box, out_box=out_box
    )
    triples = reference.relation(piece, out.indices.cpu(), *geometry, transposed=transposed)
    return _Expected(sites, triples)


def _expect_pool(layer: Any, piece: Tensor, shape: list[int], out: Any) -> _Expected:
    expected = _expect_conv(layer, piece, shape, out)
    expected.pooled = True
    return expected


def _compare(name: str, layer: Any, feats: Tensor, out: Any, expected: _Expected) -> CheckResult:
    """Compare output voxels, output, and the gradients of ``(output * random).sum()``."""
    inputs = [feats] if expected.pooled else [feats, layer.weight]
    upstream = torch.randn(out.features.shape).to(out.features)
    grads = torch.autograd.grad(out.features, inputs, upstream)

    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    n_out = out.features.shape[0]
    if expected.pooled:
        # The maximum starts at zero, and all equals get its gradient in full, as in spconv.
        result = reference.pool(exact[0], expected.triples, n_out, "max", ties="all", floor=0.0)
    else:
        c_out, *_, c_in = layer.weight.shape
        weight = exact[1].reshape(c_out, -1, c_in).permute(1, 2, 0)
        bias = layer.bias.detach().cpu().double()
        result = reference.conv(exact[0], weight, expected.triples, n_out, bias)
    exact_grads = torch.autograd.grad(result, exact, upstream.cpu().double())

    errors = [_error(out.features, result), *map(_error, grads, exact_grads)]
    same_sites = sorted(out.indices.tolist()) == sorted(expected.sites.tolist())
    passed = same_sites and max(errors) <= TOLERANCE[feats.dtype]
    weight_error = None if expected.pooled else errors[2]
    return CheckResult(name, n_out, (errors[0], errors[1], weight_error), passed)


def _error(value: Tensor, exact: Tensor) -> float:
    """Return the largest difference over the largest exact value."""
    difference = (value.detach().cpu().double() - exact.detach()).abs().max()
    return float(difference / exact.detach().abs().max())
