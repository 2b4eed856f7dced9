"""The choice of the back end for a device."""

import warnings

import pytest
import torch

from tritonspconv.kernels import has_triton


@pytest.fixture(autouse=True)
def _forget():
    has_triton.cache_clear()
    yield
    has_triton.cache_clear()


def test_an_old_card_warns_once_and_runs_in_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    old = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match=r"cuda:0 is sm_75; the Triton kernels need sm_80 or ne"):
        assert not has_triton(old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not has_triton(old)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_newer_cards_have_triton(capability, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_triton(torch.device("cuda", 0))


def test_amd_has_triton_and_a_cpu_has_not(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert has_triton(torch.device("cuda", 0))
    assert not has_triton(torch.device("cpu"))
