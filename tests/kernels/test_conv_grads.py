"""The backward pass of a convolution as one launcher, on both back ends, against the reference."""

import pytest
import torch

from tests._back_end import use_torch, use_triton
from tests._oracle import map_triples
from tritonspconv import reference
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map
from tritonspconv.kernels.conv_grads import conv_grads
from tritonspconv.testing import assert_close, random_sites

OPS = "sites", "neighbor_table", "scatter_table", "invert_table", "pairs", "conv_grads"
GEOMETRIES = {
    "subm": ConvGeometry.submanifold((3, 3, 3), (1, 1, 1)),
    "strided": ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "halved": ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
}


@pytest.fixture(params=["triton", "torch"])
def _back_end(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        use_triton(monkeypatch, *OPS)
    else:
        use_torch(monkeypatch, *OPS)


@pytest.mark.parametrize("inverse", [False, True], ids=["map", "inverse"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("needed", ["feats", "weight", "both"])
@pytest.mark.usefixtures("_back_end")
def test_gradients(triton_device, geometry, inverse, needed):
    kmap = kernel_map(random_sites(60, extent=7, repeats=3, device=triton_device), geometry)
    kmap = kmap.inverse() if inverse else kmap
    feats = torch.randn(kmap.n_in, 5, dtype=torch.float16)
    grad = torch.randn(kmap.n_out, 6, dtype=torch.float16)
    # Return spconv's layout of the weight, viewed as matrices.
    weight = torch.randn(6, kmap.kernel_volume, 5, dtype=torch.float16).permute(1, 2, 0)
    triples = map_triples(kmap)

    def oracle(dtype):
        x, w = (t.to(dtype).requires_grad_() for t in (feats, weight))
        made = reference.conv(x, w, triples, kmap.n_out)
        return torch.autograd.grad(made, (x, w), grad.to(dtype), materialize_grads=True)

    # The gradient has another dtype and layout than the weight.
    stored = torch.full((6, kmap.kernel_volume, 5), torch.nan, device=triton_device)
    grad_weight = None if needed == "feats" else stored.permute(1, 2, 0)
    grad_feats = conv_grads(
        feats.to(triton_device), grad.to(triton_device), weight.to(triton_device), kmap,
        needs_feats=needed != "weight", grad_weight=grad_weight,
    )  # fmt: skip
    expected, eager = oracle(torch.float64), oracle(torch.float16)
    if needed == "weight":
        assert grad_feats is None
    else:
        assert grad_feats.dtype == torch.float16
        assert_close(grad_feats.cpu(), expected[0], torch.float16, eager=eager[0])
    if grad_weight is not None:
        assert_close(grad_weight.cpu(), expected[1], torch.float16, eager=eager[1])
