"""Choose the back end behind the faces of ``tritonspconv.kernels``, for any device.

A test that takes ``device`` runs once for each kind of device. On a CPU it uses the numba kernels,
where numba is installed. A test marked by `every_back_end` runs twice more on a CPU: once with
torch, which is the back end without numba, and, with TRITON_INTERPRET=1, once with the Triton
kernels. So code that only a GPU dispatches to runs in CI.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

import tritonspconv
from tritonspconv import kernels
from tritonspconv.kernels.scatter_table import scatters

INTERPRETED = "interpreted"
WITHOUT_NUMBA = "cpu-torch"

every_back_end = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        WITHOUT_NUMBA,
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param(INTERPRETED, marks=pytest.mark.interpreter),
    ],
    indirect=True,
)
interpreted_only = pytest.mark.parametrize(
    "device", [pytest.param(INTERPRETED, marks=pytest.mark.interpreter)], indirect=True
)


def send_cpu_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all of the package take the back end of a GPU for tensors on any device."""
    _answer(monkeypatch, {kernels.has_triton: True, scatters: True})


def send_cpu_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all of the package take the back end of a CPU without numba."""
    _answer(monkeypatch, {kernels.has_numba: False})


def _answer(monkeypatch: pytest.MonkeyPatch, answers: dict[Callable[..., bool], bool]) -> None:
    """Replace functions that pick a back end, in every module that imports them."""
    for module in _modules():
        for name, value in list(vars(module).items()):
            for original, answer in answers.items():
                if value is original:
                    monkeypatch.setattr(module, name, lambda device, answer=answer: answer)
            if name == "_back_end":
                # A face caches its back end for a device.
                monkeypatch.setattr(module, name, value.__wrapped__)


def _modules() -> Iterator[ModuleType]:
    """Import and yield the engine's modules outside the back ends.

    A module that is imported later would keep the replaced function.
    """
    for found in pkgutil.walk_packages(tritonspconv.__path__, "tritonspconv."):
        if not {"triton", "numba", "eager", "__main__"} & set(found.name.split(".")):
            yield importlib.import_module(found.name)


def use_triton(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """Have the faces of ``ops`` call Triton, for tensors on any device."""
    for op in ops:
        use(monkeypatch, op, importlib.import_module(f"tritonspconv.kernels.triton.{op}"))


def use(monkeypatch: pytest.MonkeyPatch, op: str, back_end: ModuleType | object) -> None:
    """Have the face of ``op`` call ``back_end``, for tensors on any device."""
    face = importlib.import_module(f"tritonspconv.kernels.{op}")
    monkeypatch.setattr(face, "_back_end", lambda *device_and_ndim: back_end)


def use_torch(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """Have the faces of ``ops`` call torch, for tensors on any device."""
    for op in ops:
        use(monkeypatch, op, importlib.import_module(f"tritonspconv.kernels.eager.{op}"))
