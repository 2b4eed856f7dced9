"""Helpers of MinkowskiEngine's cases: they build and run tensors and layers on either library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.case import GRAD, Case, Quirk, Run

# The original is built for the CPU.
CPU = {"cpu": ("float64", "float32")}
EXACT = {"cpu": ("float32",)}

# Rules whose cases end the process of the original.
FATAL = (
    "Empty tensors",
    "A maximum over no rows",
    "A transposed pool whose window is its stride",
)

EXTENTS = {1: [40], 2: [13, 11], 3: [9, 8, 10], 4: [6, 5, 6, 7], 5: [4, 4, 3, 4, 4]}
N_SITES = 60


def case(
    name: str,
    function: Callable[..., None],
    /,
    *,
    quirks: tuple[Quirk, ...] = (),
    nudges: int = 0,
    **arguments: Any,
) -> Case:
    """Return the case that calls ``function(run, **arguments)``."""
    fatal = any(quirk.rule in FATAL for quirk in quirks)
    call = partial(function, **arguments)
    return Case(name, call, CPU, quirks=quirks, nudges=nudges, fatal=fatal)


def coordinates(
    run: Run,
    ndim: int = 3,
    n: int = N_SITES,
    *,
    batch_size: int = 2,
    stride: int | Sequence[int] = 1,
    name: str = "",
) -> Tensor:
    """Return int32 coordinates on both sides of zero, in multiples of ``stride``."""
    extents = EXTENTS[ndim]
    coords = run.sites(extents, min(n, batch_size * math.prod(extents)), batch_size, name)
    steps = [stride] * ndim if isinstance(stride, int) else list(stride)
    for axis, (extent, step) in enumerate(zip(extents, steps, strict=True), start=1):
        coords[:, axis] = (coords[:, axis] - extent // 2) * step
    return coords


def tensor(
    run: Run,
    channels: int,
    ndim: int = 3,
    n: int = N_SITES,
    *,
    coords: Tensor | None = None,
    batch_size: int = 2,
    name: str = "feats",
    tensor_stride: int | Sequence[int] = 1,
    **options: Any,
) -> Any:
    """Return a sparse tensor with random sites, whose features want a gradient."""
    if coords is None:
        coords = coordinates(run, ndim, n, batch_size=batch_size, stride=tensor_stride, name=name)
    feats = run.values(name, len(coords), channels).requires_grad_()
    x = run.module().SparseTensor(feats, coordinates=coords, tensor_stride=tensor_stride, **options)
    # The original chooses the rows that it keeps.
    x.F.retain_grad()
    return x


def layer(run: Run, kind: str, *args: Any, ndim: int = 3, **options: Any) -> Any:
    """Build ``Minkowski{kind}``, filled with this case's parameters."""
    module = getattr(run.module(), f"Minkowski{kind}")(*args, **options, dimension=ndim)
    return run.fill(module)


def record(run: Run, name: str, out: Any, *, kept: bool = False) -> None:
    """Record a sparse tensor."""
    run.fact(f"{name} tensor_stride", [int(step) for step in out.tensor_stride])
    run.rows(name, out.C, out.F, kept)


def run_module(run: Run, module: nn.Module, x: Any, *args: Any, kept: bool = False) -> Any:
    """Run a module forward and backward on ``x``; record output and all gradients."""
    feats = x.F
    out = module(x, *args)
    record(run, "out", out, kept=kept)
    run.backward(out.C, out.F, input=feats)
    record_gradients(run, module)
    return out


def record_gradients(run: Run, module: nn.Module) -> None:
    """Record the gradient of every parameter."""
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        run.tensor(GRAD + name, parameter.grad)


def random_points(run: Run, n: int, ndim: int = 3, batch_size: int = 2) -> Tensor:
    """Return float coordinates [n, 1 + D] between -4 and 4, several to a cell."""
    points = run.values("points", n, ndim, scale=4.0)
    batch = torch.arange(n, device=points.device) % batch_size
    return torch.cat([batch[:, None].to(points.dtype), points], 1)
