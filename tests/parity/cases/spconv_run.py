"""Helpers of spconv's cases: they build and run layers on the original and on the adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from tests.parity.case import GRAD, Run

# Sets of dtypes: for all devices, with half precision, and with autocast, which spconv lacks on a
# CPU.
SINGLE = {"cpu": ("float64", "float32"), "cuda": ("float32",)}
HALF = {"cpu": ("float64", "float32"), "cuda": ("float32", "float16")}
AMP = {"cpu": ("float64", "float32"), "cuda": ("float32", "float16", "amp-float16")}
CPU_AND_GPU = {"cpu": ("float32",), "cuda": ("float32",)}
CUDA_ONLY = {"cuda": ("float32",)}

SHAPES = {1: [40], 2: [13, 11], 3: [9, 8, 10], 4: [6, 5, 6, 7]}
N_SITES = 60


def native(run: Run) -> dict[str, Any]:
    """Return the ``algo`` argument: the original has one algorithm on a CPU."""
    return {"algo": run.module("pytorch").ConvAlgo.Native} if run.target == "cpu" else {}


def layer(run: Run, kind: str, ndim: int, *args: Any, **options: Any) -> Any:
    """Build ``f"{kind}{ndim}d"``."""
    return getattr(run.module("pytorch"), f"{kind}{ndim}d")(*args, **(native(run) | options))


def tensor(
    run: Run,
    channels: int,
    shape: Sequence[int],
    n: int = N_SITES,
    *,
    coords: Any = None,
    batch_size: int = 2,
) -> Any:
    """Return a sparse tensor with random sites, whose features want a gradient."""
    coords = run.sites(shape, min(n, math.prod(shape)), batch_size) if coords is None else coords
    feats = run.feats(len(coords), channels).requires_grad_()
    return run.module("pytorch").SparseConvTensor(feats, coords, list(shape), batch_size)


def record(run: Run, name: str, out: Any, *, kept: bool = False) -> None:
    """Record a sparse tensor."""
    run.fact(f"{name} spatial_shape", [int(n) for n in out.spatial_shape])
    run.rows(name, out.indices, out.features, kept)


def shares(out: Any, x: Any) -> bool:
    """Return whether two sparse tensors have one storage of coordinates."""
    return out.indices.data_ptr() == x.indices.data_ptr()


def run_module(run: Run, module: nn.Module, x: Any, *, kept: bool = False) -> Any:
    """Fill a module, run it forward and backward on ``x``, record output and all gradients."""
    run.fill(module)
    feats = x.features
    with run.autocast():
        out = module(x)
    record(run, "out", out, kept=kept)
    run.backward(out.indices, out.features, input=feats)
    for name, parameter in module.named_parameters():
        run.tensor(GRAD + name, parameter.grad)
    return out
