"""Run every operation in every dtype and number of axes, and write what works to docs/support.md.

  python -m scripts.tools.support_table

An entry says that the result and the gradient are as near to those in float64 as the dtype allows.
The last column is for gradients of gradients, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tritonspconv.testing import random_sites

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
START, END = "<!-- support: start -->", "<!-- support: end -->"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
AXES = (1, 2, 3, 4)
# Limits relative to the largest entry, for sums of some hundred products.
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float64: 1e-12}
EXTENT, CHANNELS = 6, 4

# A case takes features, coordinates and the number of axes, and returns a dense result.
Case = Callable[[Tensor, Tensor, int], Tensor]


def main() -> int:
    """Write the page; return the exit status."""
    PAGE.write_text(with_table(PAGE.read_text(), table(torch.device("cpu"))))
    return 0


def with_table(page: str, rows: str) -> str:
    """Return the page with other rows between its marks."""
    before, rest = page.split(START)
    return before + START + "\n" + rows + END + rest.split(END)[1]


def table(device: torch.device) -> str:
    """Return the table as Markdown, measured on a device."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    head = ["operation", *names, "gradients of gradients"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(DTYPES) + 1)]
    for name, case in CASES.items():
        cells = []
        for dtype in DTYPES:
            cells.append(_range([n for n in AXES if _works(case, n, dtype, device)]))
        cells.append(_range([n for n in AXES if _works_twice(case, n, device)]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _range(axes: list[int]) -> str:
    if not axes:
        return "-"
    together = axes == list(range(axes[0], axes[-1] + 1)) and len(axes) > 1
    return f"{axes[0]} to {axes[-1]}" if together else ", ".join(map(str, axes))


def _scene(ndim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(ndim)
    count = min(60, 2 * EXTENT**ndim - 4)
    coords = random_sites(count, ndim, extent=EXTENT, generator=generator).coords
    feats = torch.randn(count, CHANNELS, generator=generator, dtype=torch.float64)
    return feats.half().to(device, dtype).requires_grad_(), coords.to(device)


def _results(
    case: Case, ndim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    feats, coords = _scene(ndim, dtype, device)
    torch.manual_seed(0)
    out = case(feats, coords, ndim)
    weights = torch.linspace(0.5, 1.0, out.numel(), device=device).to(out.dtype).view_as(out)
    (gradient,) = torch.autograd.grad(out, feats, weights)
    return out.detach().double(), gradient.double()


def _works(case: Case, ndim: int, dtype: torch.dtype, device: torch.device) -> bool:
    try:
        found = _results(case, ndim, dtype, device)
        expected = _results(case, ndim, torch.float64, device)
    except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError):
        return False
    return all(
        bool((a - b).abs().max() <= LIMITS[dtype] * b.abs().max())
        for a, b in zip(found, expected, strict=True)
    )


def _works_twice(case: Case, ndim: int, device: torch.device) -> bool:
    feats, coords = _scene(ndim, torch.float64, device)

    def squared(values: Tensor) -> Tensor:
        torch.manual_seed(0)
        out = case(values, coords, ndim)
        (gradient,) = torch.autograd.grad((out**2).sum(), values, create_graph=True)
        return gradient

    try:
        gradient = squared(feats)
        direction = torch.linspace(-1, 1, feats.numel(), device=device).double().view_as(feats)
        (second,) = torch.autograd.grad((gradient * direction).sum(), feats)
    except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError):
        return False
    step = 1e-6
    ahead, behind = (
        squared((feats + sign * step * direction).detach().requires_grad_()).detach()
        for sign in (1, -1)
    )
    expected = float((((ahead - behind) / (2 * step)) * direction).sum())
    found = float((second * direction).sum().detach())
    return abs(found - expected) <= 1e-5 * max(1.0, abs(expected))


def _tensor(feats: Tensor, coords: Tensor, ndim: int) -> ts.SparseTensor:
    return ts.SparseTensor(feats, coords, spatial_shape=(EXTENT,) * ndim, batch_size=2)


def _weights(module: torch.nn.Module, feats: Tensor) -> torch.nn.Module:
    """Round the weights to float16, so that every dtype starts from the same ones."""
    return module.half().to(feats.device, feats.dtype)


def _layer(name: str, *args: Any, **options: Any) -> Case:
    def run(feats: Tensor, coords: Tensor, ndim: int) -> Tensor:
        layer = _weights(getattr(ts.nn, f"{name}{ndim}d")(*args, **options), feats)
        return layer(_tensor(feats, coords, ndim)).feats

    return run


def _inverse(feats: Tensor, coords: Tensor, ndim: int) -> Tensor:
    down = _weights(getattr(ts.nn, f"SparseConv{ndim}d")(CHANNELS, 5, 2, 2), feats)
    up = _weights(getattr(ts.nn, f"SparseInverseConv{ndim}d")(5, 3, 2), feats)
    x = _tensor(feats, coords, ndim)
    return up(down(x), x).feats


def _onto_given(feats: Tensor, coords: Tensor, ndim: int) -> Tensor:
    x = _tensor(feats, coords, ndim)
    coarse = _weights(getattr(ts.nn, f"SparseConv{ndim}d")(CHANNELS, 5, 2, 2), feats)(x)
    layer = _weights(getattr(ts.nn, f"SparseConvTranspose{ndim}d")(5, 3, 3, 2, 1, 1), feats)
    return layer(coarse, x).feats


def _plain(module: Callable[[], Any]) -> Case:
    def run(feats: Tensor, coords: Tensor, ndim: int) -> Tensor:
        made = _weights(module(), feats)
        out = made(_tensor(feats, coords, ndim))
        return out if isinstance(out, Tensor) else out.feats

    return run


def _voxelize(reduce: Any) -> Case:
    def run(feats: Tensor, coords: Tensor, ndim: int) -> Tensor:
        # The places are fixed and exact in every dtype; the last column has the gradient.
        places = coords[:, 1:].to(feats.dtype) + 0.5
        points = torch.cat([places, feats], dim=1)
        box = (0.0,) * ndim + (float(EXTENT),) * ndim
        out = ts.ops.voxelize(points, (2.0,) * ndim, box, batch_index=coords[:, 0], reduce=reduce)
        assert out.feats is not None
        return out.feats[:, ndim:]

    return run


def _spconv(name: str, *args: Any, **options: Any) -> Case:
    def run(feats: Tensor, coords: Tensor, ndim: int) -> Tensor:
        layer = _weights(getattr(spconv, f"{name}{ndim}d")(*args, **options), feats)
        return layer(spconv.SparseConvTensor(feats, coords, [EXTENT] * ndim, 2)).features

    return run


def _minkowski(name: str, *args: Any, **options: Any) -> Case:
    def run(feats: Tensor, coords: Tensor, ndim: int) -> Tensor:
        layer = _weights(getattr(ME, name)(*args, dimension=ndim, **options), feats)
        return layer(ME.SparseTensor(feats, coordinates=coords)).F

    return run


def _generative(feats: Tensor, coords: Tensor, ndim: int) -> Tensor:
    options: dict[str, Any] = {"kernel_size": 2, "stride": 2, "dimension": ndim}
    down = _weights(ME.MinkowskiConvolution(CHANNELS, 5, **options), feats)
    up = _weights(ME.MinkowskiGenerativeConvolutionTranspose(5, 3, **options), feats)
    return up(down(ME.SparseTensor(feats, coordinates=coords))).F


C = CHANNELS
CASES: dict[str, Case] = {
    "submanifold convolution": _layer("SubMConv", C, 5, 3),
    "strided convolution": _layer("SparseConv", C, 5, 3, 2, 1),
    "transposed convolution to every reached site": _layer("SparseConvTranspose", C, 5, 2, 2),
    "transposed convolution to given sites": _onto_given,
    "inverse convolution": _inverse,
    "max pooling": _layer("MaxPool", 2, 2),
    "average pooling": _layer("AvgPool", 2, 2),
    "sum pooling": _layer("SumPool", 2, 2),
    "global average pooling": _plain(ts.nn.GlobalAvgPool),
    "global max pooling": _plain(ts.nn.GlobalMaxPool),
    "global sum pooling": _plain(ts.nn.GlobalSumPool),
    "batch norm": _plain(lambda: ts.nn.BatchNorm(C)),
    "linear": _plain(lambda: ts.nn.Linear(C, 5)),
    "to a dense tensor": lambda feats, coords, ndim: _tensor(feats, coords, ndim).dense(),
    "voxelisation, mean": _voxelize("mean"),
    "voxelisation, max": _voxelize("max"),
    "`compat.spconv` `SubMConv`": _spconv("SubMConv", C, 5, 3, padding=1),
    "`compat.spconv` `SparseConv`": _spconv("SparseConv", C, 5, 3, 2, 1),
    "`compat.spconv` `SparseConvTranspose`": _spconv("SparseConvTranspose", C, 5, 2, 2),
    "`compat.spconv` `SparseMaxPool`": _spconv("SparseMaxPool", 2, 2),
    "`compat.minkowski` `MinkowskiConvolution`": _minkowski(
        "MinkowskiConvolution", C, 5, kernel_size=3, stride=2
    ),
    "`compat.minkowski` `MinkowskiGenerativeConvolutionTranspose`": _generative,
    "`compat.minkowski` `MinkowskiChannelwiseConvolution`": _minkowski(
        "MinkowskiChannelwiseConvolution", C, kernel_size=3
    ),
    "`compat.minkowski` `MinkowskiMaxPooling`": _minkowski(
        "MinkowskiMaxPooling", kernel_size=2, stride=2
    ),
    "`compat.minkowski` `MinkowskiAvgPooling`": _minkowski(
        "MinkowskiAvgPooling", kernel_size=2, stride=2
    ),
    "`compat.minkowski` `MinkowskiSumPooling`": _minkowski(
        "MinkowskiSumPooling", kernel_size=2, stride=2
    ),
}


if __name__ == "__main__":
    raise SystemExit(main())
