"""Compare an exported file with its network."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tritonspconv.export.onnx.errors import OnnxExportError
from tritonspconv.export.onnx.inputs import copied, leaves
from tritonspconv.export.onnx.network import OnnxNetwork, rows_of
from tritonspconv.has_rows import has_rows

# Largest difference relative to the largest value of an output.
_TOLERANCE = {
    torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1,
}  # fmt: skip


class ScanCheck(NamedTuple):
    """The differences between a file and its network on one scan.

    Attributes:
        rows: Rows of each input.
        max_error: Largest absolute difference of an output.
        max_value: Largest absolute value of an output of the network.
    """

    rows: tuple[int, ...]
    max_error: float
    max_value: float


def compare(
    model: nn.Module, network: OnnxNetwork, inputs: tuple[Any, ...], dtype: Any
) -> ScanCheck:
    """Run both on one scan.

    Args:
        model: The network.
        network: The file.
        inputs: The scan, as the network takes it.
        dtype: A further dtype whose rounding the file may have, besides the dtype of the outputs;
            None: no other.

    Raises:
        OnnxExportError: They differ, because the file holds a value of the example.
    """
    with torch.no_grad():
        expected = leaves(model(*copied(inputs)))
    given = list(leaves(copied(inputs)).values())
    found = network(*given)
    found = found if isinstance(found, dict) else {"": found}
    rows = tuple(_rows(value) for value in given)
    worst, largest = 0.0, 0.0
    for path, value in expected.items():
        error, size = _difference(path, value, found[path], dtype)
        worst, largest = max(worst, error), max(largest, size)
    return ScanCheck(rows, worst, largest)


def _rows(value: Any) -> int:
    return (rows_of(value, "")[0] if has_rows(value) else value).shape[0]


def _difference(path: str, expected: Any, found: Any, dtype: Any) -> tuple[float, float]:
    where = f"output {path!r}" if path else "the output"
    if has_rows(expected):
        expected, sites = rows_of(expected, where)
        if not torch.equal(sites.coords, found.coords):
            raise _differ(f"{where} has other coordinates than in the network")
        found = found.feats
    assert isinstance(expected, Tensor)
    if expected.shape != found.shape:
        raise _differ(
            f"{where} has the shape {list(found.shape)}, and {list(expected.shape)} in the network"
        )
    if not expected.numel():
        return 0.0, 0.0
    wide = torch.float64 if expected.is_floating_point() else expected.dtype
    error = float((expected.to(wide) - found.to(wide)).abs().max())
    size = float(expected.to(wide).abs().max())
    kinds = [expected.dtype, *(() if dtype is None else (dtype,))]
    allowed = max(_TOLERANCE.get(kind, 0.0) for kind in kinds)
    if not error <= allowed * max(size, 1e-6):
        raise _differ(f"{where} differs by {error:.3g} of values up to {size:.3g}")
    return error, size


def _differ(what: str) -> OnnxExportError:
    return OnnxExportError(
        f"export_onnx: {what} when another scan runs through the file. The code of the network "
        "computes something of each scan that a file cannot hold: a number of rows, a branch, "
        "random numbers. No file was written."
    )
