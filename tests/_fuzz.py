"""Random valid layers beside dense torch convolution, and random mistakes; on any device."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from compat.spconv.pytorch._errors import SpconvError
from tests import _hostile
from tests._strategies import site_sets
from tritonspconv import reference
from tritonspconv.coords import Grid

DENSE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
DENSE_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@st.composite
def layers(draw) -> dict[str, Any]:
    """Draw a layer of the engine or of compat.spconv and the sites that it reads.

    Rows are distinct and inside the grid, so a dense layer gives the right result.
    """
    ndim = draw(st.integers(1, 3))
    drawn = draw(site_sets(ndim, bounded=True))
    inside = drawn.coords[drawn.grid.contains(drawn.coords)]
    coords = inside.unique(dim=0)
    coords = coords[draw(st.permutations(range(len(coords))))] if len(coords) else coords
    # The grid holds the window and leaves room beside the sites.
    grid = Grid((0,) * ndim, tuple(n + 6 for n in drawn.grid.shape), drawn.grid.batch_size)
    per_axis = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * ndim))  # noqa: E731
    kind = draw(st.sampled_from(["submanifold", "strided", "transposed"]))
    kernel_size = per_axis(1, 3)
    if kind == "submanifold":
        kernel_size = tuple(2 * (k // 2) + 1 for k in kernel_size)
    return {
        "library": draw(st.sampled_from([ts.nn, spconv])),
        "kind": kind,
        "coords": coords,
        "grid": grid,
        "kernel_size": kernel_size,
        "stride": per_axis(1, 3),
        "padding": tuple(draw(st.integers(0, k - 1)) for k in kernel_size),
        "dilation": per_axis(1, 2) if kind != "transposed" else (1,) * ndim,
        "channels": draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
        "bias": draw(st.booleans()),
    }


def check_layer(drawn: dict[str, Any], device: torch.device) -> int:
    """Check output and gradients of a layer against dense torch; return its number of rows."""
    coords, grid, library = drawn["coords"].to(device), drawn["grid"], drawn["library"]
    ndim, (c_in, c_out) = grid.ndim, drawn["channels"]
    options: dict[str, Any] = {"bias": drawn["bias"]}
    stem = {"submanifold": "SubMConv", "strided": "SparseConv", "transposed": "SparseConvTranspose"}
    if drawn["kind"] == "submanifold":
        options["dilation"] = drawn["dilation"]
    else:
        options |= {"stride": drawn["stride"], "padding": drawn["padding"]}
        if drawn["kind"] == "strided":
            options["dilation"] = drawn["dilation"]
    kind = getattr(library, f"{stem[drawn['kind']]}{ndim}d")
    layer = kind(c_in, c_out, drawn["kernel_size"], **options).to(device, torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    feats = torch.randn(len(coords), c_in, dtype=torch.float64).to(device).requires_grad_()
    if library is spconv:
        x: Any = spconv.SparseConvTensor(feats, coords, list(grid.shape), grid.batch_size)
        try:
            y = layer(x)
        except SpconvError as error:
            if "points vanished" not in str(error):
                raise
            return 0
        out, at, weight = y.features, tuple(y.indices.long().T), layer.weight
        # The weight is [out, *k, in]; layers of one tap and stride 1 read its memory as [in, out].
        if layer.conv1x1:
            window = weight.reshape(c_in, c_out).T.reshape(c_out, *[1] * ndim, c_in)
        else:
            window = weight
        window = window.movedim(-1, 1).contiguous()
    else:
        y = layer(ts.SparseTensor(feats, coords, spatial_shape=grid.shape, batch_size=2))
        out, at = y.feats, tuple(y.coords.long().T)
        window = (
            layer.weight.reshape(*drawn["kernel_size"], c_in, c_out)
            .movedim((-1, -2), (0, 1))
            .contiguous()
        )
    batch = max(grid.batch_size, 2)
    dense = feats.new_zeros(batch, *grid.shape, c_in).index_put(tuple(coords.long().T), feats)
    dense = dense.movedim(-1, 1)
    if drawn["kind"] == "submanifold":
        padding = [
            d * (k // 2) for k, d in zip(drawn["kernel_size"], drawn["dilation"], strict=True)
        ]
        expected = DENSE[ndim](dense, window, layer.bias, 1, padding, drawn["dilation"])
    elif drawn["kind"] == "strided":
        expected = DENSE[ndim](
            dense, window, layer.bias, drawn["stride"], drawn["padding"], drawn["dilation"]
        )
    else:
        expected = DENSE_TRANSPOSED[ndim](
            dense,
            window.transpose(0, 1).contiguous(),
            layer.bias,
            drawn["stride"],
            drawn["padding"],
        )
    expected = expected.movedim(1, -1)
    rest = torch.ones(expected.shape[:-1], dtype=torch.bool, device=device)
    rest[at] = False
    torch.testing.assert_close(out, expected[at], rtol=1e-9, atol=1e-9)
    if drawn["kind"] != "submanifold":
        # Where the sparse layer has no row, the dense layer has only the bias.
        idle = expected[rest]
        bias = torch.zeros_like(idle) if layer.bias is None else layer.bias.expand_as(idle)
        torch.testing.assert_close(idle, bias, rtol=1e-9, atol=1e-9)
    if len(out):
        grad = torch.randn(out.shape, dtype=torch.float64).to(device)
        leaves = [feats, *layer.parameters()]
        for ours, exact in zip(
            torch.autograd.grad(out, leaves, grad),
            torch.autograd.grad(expected[at], leaves, grad),
            strict=True,
        ):
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
    return len(out)


@st.composite
def minkowski_layers(draw) -> dict[str, Any]:
    """Draw a convolution of compat.minkowski and coordinates of any sign."""
    ndim = draw(st.integers(1, 3))
    drawn = draw(site_sets(ndim, bounded=False))
    return {
        "coords": drawn.coords.unique(dim=0),
        "kernel_size": draw(st.integers(1, 4 if ndim < 3 else 3)),
        "stride": draw(st.integers(1, 3)),
        "dilation": draw(st.integers(1, 2)),
        "channels": draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
    }


def check_minkowski_layer(drawn: dict[str, Any], device: torch.device) -> int:
    """Check a convolution of compat.minkowski against brute force; return its rows."""
    coords, stride, k, d = (drawn[x] for x in ("coords", "stride", "kernel_size", "dilation"))
    ndim, (c_in, c_out) = coords.shape[1] - 1, drawn["channels"]
    if not len(coords):
        return 0
    layer = ME.MinkowskiConvolution(
        c_in, c_out, kernel_size=k, stride=stride, dilation=d, dimension=ndim
    ).to(device, torch.float64)
    feats = torch.randn(len(coords), c_in, dtype=torch.float64).to(device).requires_grad_()
    y = layer(ME.SparseTensor(feats, coordinates=coords.to(device)))
    cells = y.C.cpu().clone()
    cells[:, 1:] //= stride
    expected_cells = reference.output_sites(
        coords, (1,) * ndim, (stride,) * ndim, (0,) * ndim, (1,) * ndim, rule="cells"
    )
    assert sorted(cells.tolist()) == sorted(expected_cells.tolist())
    padding = (d * (k // 2) if k % 2 else 0,) * ndim
    triples = reference.relation(
        coords, cells, (k,) * ndim, (stride,) * ndim, padding, (d,) * ndim,
        tap_order="first_axis_fastest",
    )  # fmt: skip
    weight = layer.kernel.reshape(k**ndim, c_in, c_out)
    grad = torch.randn(len(cells), c_out, dtype=torch.float64)
    copies = [x.detach().cpu().requires_grad_() for x in (feats, weight)]
    exact = reference.conv(*copies, triples, len(cells))
    torch.testing.assert_close(y.F.cpu(), exact, rtol=1e-9, atol=1e-9)
    ours = torch.autograd.grad(y.F, (feats, layer.kernel), grad.to(device))
    for a, b in zip(ours, torch.autograd.grad(exact, copies, grad), strict=True):
        torch.testing.assert_close(a.cpu().reshape(b.shape), b, rtol=1e-9, atol=1e-9)
    return len(cells)


def mistakes() -> list[tuple[str, str, str]]:
    """Return every call with every argument and every value; the three together name a mistake."""
    return [
        (name, argument, value)
        for name, call in sorted(_hostile.calls().items())
        for argument in call.arguments()
        for value in _hostile.VALUES
        if (argument, value) not in _hostile.LEGAL_BUT_LARGE
    ]


def check_mistake(
    mistake: tuple[str, str, str], device: torch.device, expected: list[Tensor]
) -> bool:
    """Make a mistake; check its error and the next valid call. Return whether it was refused."""
    name, argument, value = mistake
    call = _hostile.calls()[name]
    error = _hostile.outcome(call, argument, _hostile.VALUES[value])
    for ours, exact in zip(_hostile.sentinel(str(device)), expected, strict=True):
        assert torch.equal(ours, exact), f"after {mistake}, a valid call is another"
    if error is None:
        return False
    assert isinstance(error, _hostile.REFUSALS), f"{mistake}: {error!r}"
    assert len(str(error)) >= 15, f"{mistake}: {error!r}"
    return True


CHECKS: dict[str, tuple[Callable[..., Any], Callable[..., int]]] = {
    "layers": (layers, check_layer),
    "compat.minkowski": (minkowski_layers, check_minkowski_layer),
}
