"""The choice of the back end for a device."""

import importlib
import warnings

import pytest
import torch

from tritonspconv.kernels import NUMBA_VARIABLE, has_numba, has_triton


@pytest.fixture(autouse=True)
def _forget():
    has_triton.cache_clear()
    has_numba.cache_clear()
    yield
    has_triton.cache_clear()
    has_numba.cache_clear()


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


CPU = torch.device("cpu")


def test_numba_kernels_run_on_a_cpu_that_has_numba():
    pytest.importorskip("numba", reason="numba is not installed")
    assert has_numba(CPU)
    assert not has_numba(torch.device("cuda", 0))


def test_a_variable_switches_numba_off(monkeypatch):
    monkeypatch.setenv(NUMBA_VARIABLE, "0")
    assert not has_numba(CPU)


def test_without_numba_nothing_is_said(monkeypatch):
    """``tritonspconv doctor`` names the extra."""
    fail_to_import(monkeypatch, ModuleNotFoundError("No module named 'numba'", name="numba"))
    assert not has_numba(CPU)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("Numba needs NumPy 2.3 or less. Got NumPy 2.9."),
        ModuleNotFoundError("No module named 'llvmlite'", name="llvmlite"),
    ],
    ids=["numpy", "llvmlite"],
)
def test_a_numba_that_does_not_work_warns_once(error, monkeypatch):
    fail_to_import(monkeypatch, error)
    with pytest.warns(UserWarning, match=r"numba is installed and cannot be imported \(.*Num|llvm"):
        assert not has_numba(CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not has_numba(CPU)


def fail_to_import(monkeypatch, error: ImportError) -> None:
    def import_module(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", import_module)
