"""Choose the back end behind the faces of ``tritonspconv.kernels``, whatever the device."""

import importlib
from types import ModuleType

import pytest


def use_triton(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """Have the faces of ``ops`` call Triton, whatever the device of their tensors."""
    for op in ops:
        use(monkeypatch, op, importlib.import_module(f"tritonspconv.kernels.triton.{op}"))


def use(monkeypatch: pytest.MonkeyPatch, op: str, back_end: ModuleType | object) -> None:
    """Have the face of ``op`` call ``back_end``, whatever the device of its tensors."""
    face = importlib.import_module(f"tritonspconv.kernels.{op}")
    monkeypatch.setattr(face, "_back_end", lambda *device_and_ndim: back_end)


def use_torch(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """Have the faces of ``ops`` call torch, whatever the device of their tensors."""
    for op in ops:
        use(monkeypatch, op, importlib.import_module(f"tritonspconv.kernels.eager.{op}"))
