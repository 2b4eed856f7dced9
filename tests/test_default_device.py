"""Operations make their tensors on the device of their arguments, for any default device."""

from __future__ import annotations

import pytest
import torch

from tests._capture_cases import NETS, scan


@pytest.mark.parametrize("name", NETS)
def test_a_network_runs_under_another_default_device(name: str, device: torch.device) -> None:
    net = NETS[name]().eval().to(device)
    feats, coords = scan(60, device=device.type)
    feats.requires_grad_()
    expected = net(feats, coords)
    leaves = [feats, *net.parameters()]
    grads = torch.autograd.grad(expected.square().sum(), leaves)
    feats, coords = feats.detach().clone().requires_grad_(), coords.clone()
    leaves[0] = feats
    # A tensor that is made on the default device has no values here.
    with torch.device("meta"):
        found = net(feats, coords)
        again = torch.autograd.grad(found.square().sum(), leaves)
    assert torch.equal(found, expected)
    for one, other in zip(again, grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NETS)
def test_a_network_is_built_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        net = NETS[name]()
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}
    filled = net.to_empty(device="cpu")
    filled.load_state_dict(NETS[name]().state_dict())
    assert filled.eval()(*scan(40)).isfinite().all()
