"""Public calls, valid arguments for each, and values that do not belong there.

A mistake is a call with one argument replaced. The call returns, or it raises one of `REFUSALS`
with a message of a sentence. The next valid call is right in either case.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tritonspconv.testing import random_sites

# Exceptions by which a library may answer a caller's mistake. Others, such as IndexError, are
# faults of the library.
REFUSALS = (TypeError, ValueError, NotImplementedError, RuntimeError)


class Call(NamedTuple):
    """A public call.

    Attributes:
        run: The call.
        arguments: A function that makes valid arguments for each run.
    """

    run: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]


def _coords(device: str, ndim: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return random_sites(20, ndim, extent=5, generator=generator, device=device).coords


def _feats(device: str, channels: int = 4) -> Tensor:
    steps = torch.arange(20.0 * channels, device=device).reshape(20, channels)
    return (steps % 7 - 3) / 2


def _engine(device: str = "cpu") -> ts.SparseTensor:
    return ts.SparseTensor(_feats(device), _coords(device), spatial_shape=(5, 5, 5), batch_size=2)


def _spconv(device: str = "cpu") -> spconv.SparseConvTensor:
    return spconv.SparseConvTensor(_feats(device), _coords(device), [5, 5, 5], 2)


def _minkowski(device: str = "cpu") -> ME.SparseTensor:
    return ME.SparseTensor(_feats(device), coordinates=_coords(device))


def _layer(kind: Callable[..., nn.Module], make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call that builds a layer and runs it."""

    def run(**arguments: Any) -> Any:
        return kind(**arguments)(make())

    return run


def calls() -> dict[str, Call]:
    """Return the public constructors and calls by name."""
    conv = {"in_channels": 4, "out_channels": 3, "kernel_size": 3}
    strided = {**conv, "stride": 2, "padding": 1, "dilation": 1, "bias": True}
    window = {"kernel_size": 2, "stride": 2}
    made: dict[str, Call] = {
        "tritonspconv.SparseTensor": Call(
            ts.SparseTensor,
            lambda: {
                "feats": _feats("cpu"), "coords": _coords("cpu"), "spatial_shape": (5, 5, 5),
                "batch_size": 2,
            },
        ),
        "tritonspconv.ops.voxelize": Call(
            ts.ops.voxelize,
            lambda: {
                "points": torch.linspace(0, 3.9, 40).reshape(10, 4), "voxel_size": (1.0, 1.0, 1.0),
                "point_range": (0.0, 0.0, 0.0, 4.0, 4.0, 4.0),
            },
        ),
        "tritonspconv.nn.SubMConv3d()": Call(
            lambda input: _fixed(ts.nn.SubMConv3d(4, 3, 3))(input), lambda: {"input": _engine()}
        ),
        "compat.spconv.SparseConvTensor": Call(
            spconv.SparseConvTensor,
            lambda: {
                "features": _feats("cpu"), "indices": _coords("cpu"), "spatial_shape": [5, 5, 5],
                "batch_size": 2,
            },
        ),
        "compat.spconv.SubMConv3d()": Call(
            lambda input: _fixed(spconv.SubMConv3d(4, 3, 3))(input), lambda: {"input": _spconv()}
        ),
        "compat.minkowski.SparseTensor": Call(
            ME.SparseTensor,
            lambda: {
                "features": _feats("cpu"), "coordinates": _coords("cpu"), "tensor_stride": 1,
            },
        ),
        "compat.minkowski.MinkowskiConvolution()": Call(
            lambda input: _fixed(
                ME.MinkowskiConvolution(4, 3, kernel_size=3, dimension=3)
            )(input),
            lambda: {"input": _minkowski()},
        ),
    }  # fmt: skip
    layers: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any], dict[str, Any]]] = {
        "tritonspconv.nn.SubMConv3d": (ts.nn.SubMConv3d, _engine, {**conv, "dilation": 1}),
        "tritonspconv.nn.SparseConv3d": (ts.nn.SparseConv3d, _engine, strided),
        "tritonspconv.nn.SparseConvTranspose3d": (
            ts.nn.SparseConvTranspose3d, _engine, {**conv, "stride": 2, "padding": 0},
        ),
        "tritonspconv.nn.MaxPool3d": (ts.nn.MaxPool3d, _engine, {**window, "padding": 0}),
        "compat.spconv.SubMConv3d": (spconv.SubMConv3d, _spconv, {**conv, "dilation": 1}),
        "compat.spconv.SparseConv3d": (spconv.SparseConv3d, _spconv, strided),
        "compat.spconv.SparseConvTranspose3d": (
            spconv.SparseConvTranspose3d, _spconv, {**conv, "stride": 2, "padding": 0},
        ),
        "compat.spconv.SparseMaxPool3d": (
            spconv.SparseMaxPool3d, _spconv, {**window, "padding": 0},
        ),
        "compat.minkowski.MinkowskiConvolution": (
            ME.MinkowskiConvolution, _minkowski,
            {**conv, "stride": 2, "dilation": 1, "dimension": 3},
        ),
        "compat.minkowski.MinkowskiConvolutionTranspose": (
            ME.MinkowskiConvolutionTranspose, _minkowski, {**conv, "stride": 1, "dimension": 3},
        ),
        "compat.minkowski.MinkowskiMaxPooling": (
            ME.MinkowskiMaxPooling, _minkowski, {**window, "dimension": 3},
        ),
    }  # fmt: skip
    for name, (kind, make, arguments) in layers.items():
        made[name] = Call(_layer(kind, make), lambda arguments=arguments: dict(arguments))
    return made


# No value here is valid for every argument. Each call makes its value again.
VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "0": lambda: 0,
    "-1": lambda: -1,
    "1.5": lambda: 1.5,
    "3.0": lambda: 3.0,
    "nan": lambda: float("nan"),
    "'2'": lambda: "2",
    "True": lambda: True,
    "2**20": lambda: 2**20,
    "2**31": lambda: 2**31,
    "2**63": lambda: 2**63,
    "[]": list,
    "[2, 2]": lambda: [2, 2],
    "[2, 2, 2, 2]": lambda: [2, 2, 2, 2],
    "[2, -1, 2]": lambda: [2, -1, 2],
    "[2, 1.5, 2]": lambda: [2, 1.5, 2],
    "[None] * 3": lambda: [None] * 3,
    "{}": dict,
    "object()": object,
    "numpy int64": lambda: np.int64(2),
    "numpy array [20, 4]": lambda: np.zeros((20, 4), np.float32),
    "numpy int array [20, 4]": lambda: np.zeros((20, 4), np.int32),
    "tensor of one int": lambda: torch.tensor(2),
    "tensor [3]": lambda: torch.tensor([2, 2, 2]),
    "zeros [20, 4]": lambda: torch.zeros(20, 4),
    "zeros [20, 5]": lambda: torch.zeros(20, 5),
    "zeros [19, 4]": lambda: torch.zeros(19, 4),
    "zeros [20]": lambda: torch.zeros(20),
    "zeros [0, 4]": lambda: torch.zeros(0, 4),
    "zeros [2, 10, 4]": lambda: torch.zeros(2, 10, 4),
    "int32 zeros [20, 4]": lambda: torch.zeros(20, 4, dtype=torch.int32),
    "int64 zeros [20, 4]": lambda: torch.zeros(20, 4, dtype=torch.int64),
    "int32 zeros [0, 4]": lambda: torch.zeros(0, 4, dtype=torch.int32),
    "int32 -5 [20, 4]": lambda: torch.full((20, 4), -5, dtype=torch.int32),
    "int32 2**31-1 [20, 4]": lambda: torch.full((20, 4), 2**31 - 1, dtype=torch.int32),
    "bool [20, 4]": lambda: torch.ones(20, 4, dtype=torch.bool),
    "complex [20, 4]": lambda: torch.zeros(20, 4, dtype=torch.complex64),
    "float8 [20, 4]": lambda: torch.zeros(20, 4).to(torch.float8_e4m3fn),
    "nan [20, 4]": lambda: torch.full((20, 4), torch.nan),
    "meta [20, 4]": lambda: torch.zeros(20, 4, device="meta"),
    "meta int32 [20, 4]": lambda: torch.zeros(20, 4, dtype=torch.int32, device="meta"),
    "sparse [20, 4]": lambda: torch.eye(20, 4).to_sparse(),
    "half [20, 4]": lambda: torch.zeros(20, 4, dtype=torch.float16),
    "columns first [20, 4]": lambda: torch.arange(80.0).reshape(4, 20).T,
    "a module": lambda: nn.ReLU(),
    "an engine tensor": _engine,
    "a tensor of compat.spconv": _spconv,
    "a tensor of compat.minkowski": _minkowski,
}


# These calls are legal, but take much memory and time. If the operating system promises more memory
# than exists, weights of 2**31 channels end the process, also those of `torch.nn.Linear`.
LEGAL_BUT_LARGE = {
    ("out_channels", "2**20"),
    ("in_channels", "2**31"),
    ("out_channels", "2**31"),
    *(("dimension", value) for value in ("2**20", "2**31", "2**63")),
}


def _fixed(layer: nn.Module) -> nn.Module:
    """Give the layer parameters that are the same in every run, and return the layer."""
    for parameter in layer.parameters():
        steps = torch.arange(float(parameter.numel()), device=parameter.device)
        parameter.data.copy_((steps % 5 - 2).view_as(parameter))
    return layer


def sentinel(device: str = "cpu") -> list[Tensor]:
    """Return outputs and gradients of valid calls, with numbers for which sums are exact."""
    found = []
    for layer, make, feats_of in (
        (ts.nn.SparseConv3d(4, 3, 3, 2, 1), _engine, lambda out: out.feats),
        (spconv.SubMConv3d(4, 3, 3), _spconv, lambda out: out.features),
        (
            ME.MinkowskiConvolution(4, 3, kernel_size=2, stride=2, dimension=3),
            _minkowski, lambda out: out.F,
        ),
    ):  # fmt: skip
        out = feats_of(_fixed(layer.to(device))(make(device)))
        found += [out.detach(), *torch.autograd.grad(out.sum(), list(layer.parameters()))]
    return found


def outcome(call: Call, argument: str, value: Callable[[], Any]) -> Exception | None:
    """Run a call with one argument replaced; return its exception, or None."""
    arguments = call.arguments()
    arguments[argument] = value()
    try:
        call.run(**arguments)
    except Exception as error:
        return error
    return None
