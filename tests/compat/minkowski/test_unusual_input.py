"""NaN, and memory that is not contiguous, in the adapter and in the original."""

import math
import warnings

import pytest
import torch

from tests.compat._libraries import library

# Warnings of the original are no warnings of ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NAN = math.nan
COORDS = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 4, 2], [0, 5, 2], [0, 8, 8]], dtype=torch.int32)
LEAST = torch.finfo(torch.float32).min


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Return equal values, column by column in memory, as ``nonzero`` on a GPU returns them."""
    other = tensor.t().contiguous().t()
    assert not other.is_contiguous()
    return other


@pytest.fixture(params=["adapter", "original"])
def which(request: pytest.FixtureRequest) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library("MinkowskiEngine", request.param)
    return request.param


def test_local_maxima_pass_nan_on(which):
    ME = library("MinkowskiEngine", which)
    feats = torch.tensor([[NAN, 1.0], [2, NAN], [NAN, NAN], [NAN, 3], [-1, -2]])
    y = ME.MinkowskiMaxPooling(2, 2, dimension=2)(ME.SparseTensor(feats, COORDS))
    by_site = {tuple(c): f for c, f in zip(y.C.tolist(), y.F, strict=True)}
    expected = {
        "adapter": {(0, 0, 0): [NAN, NAN], (0, 4, 2): [NAN, NAN], (0, 8, 8): [-1, -2]},
        # The original leaves NaN out; a cell of NaN alone has the least float32.
        "original": {(0, 0, 0): [2, 1], (0, 4, 2): [LEAST, 3], (0, 8, 8): [-1, -2]},
    }[which]
    assert by_site.keys() == expected.keys()
    for site, feats in by_site.items():
        torch.testing.assert_close(feats, torch.tensor(expected[site]).float(), equal_nan=True)


def _convolved(ME, x, change):
    layer = ME.MinkowskiConvolution(2, 2, kernel_size=3, dimension=2)
    kernel = torch.arange(36.0).view(9, 2, 2)
    layer.kernel = torch.nn.Parameter(change(kernel.flatten(1)).view(9, 2, 2))
    return layer(x)


def _broadcast(ME, x, change):
    changed = ME.SparseTensor(
        change(x.F), coordinate_map_key=x.coordinate_map_key, coordinate_manager=x._manager
    )
    return ME.MinkowskiBroadcastAddition()(changed, ME.MinkowskiGlobalSumPooling()(x))


CALLS = {
    "coordinates": lambda ME, x, change: ME.SparseTensor(x.F, change(COORDS)),
    "points": lambda ME, x, change: ME.TensorField(x.F, change(COORDS.float())).sparse(),
    "queries": lambda ME, x, change: x.features_at_coordinates(change(COORDS.float() + 0.25)),
    "broadcast": _broadcast,
    "kernel": _convolved,
    "quantized": lambda ME, x, change: ME.utils.sparse_quantize(change(COORDS)),
}


@pytest.mark.parametrize("name", CALLS)
def test_memory_of_any_strides_is_read_rightly(name, which):
    ME = library("MinkowskiEngine", which)
    x = ME.SparseTensor(torch.arange(10.0).view(5, 2), COORDS)
    if which == "original":
        with pytest.raises(RuntimeError, match="contiguous"):
            CALLS[name](ME, x, strided)
        return
    plain, changed = (CALLS[name](ME, x, change) for change in (torch.clone, strided))
    torch.testing.assert_close(getattr(changed, "F", changed), getattr(plain, "F", plain))
    if name in ("coordinates", "points"):
        assert changed.C.tolist() == plain.C.tolist()
