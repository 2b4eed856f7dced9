"""The originals: their import names, requirements and cases."""

from __future__ import annotations

import collections
import collections.abc
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.parity.case import Case


@dataclass(frozen=True)
class Original:
    """A library and its adapter.

    Attributes:
        name: Import name of the original.
        adapter: Import name of the adapter.
        distributions: Names of its distributions; the first installed one gives the version.
        modules: Modules with a list ``CASES`` each.
        prepare: Called with the target before the original runs.
        has_gpu: Returns whether the installed build runs on a GPU.
        golden_target: The device that its golden file is recorded on.
    """

    name: str
    adapter: str
    distributions: tuple[str, ...]
    modules: tuple[str, ...]
    prepare: Callable[[str], None]
    has_gpu: Callable[[], bool]
    golden_target: str = "cuda"

    def absence(self, target: str) -> str | None:
        """Return why the original cannot run on ``"cpu"`` or ``"cuda"``; None if it can."""
        if importlib.util.find_spec(self.name) is None:
            return f"the original, {self.name}, is not installed"
        if target == "cuda" and not self.has_gpu():
            return f"the original installed, {self.version}, runs on CPUs only"
        return None

    @property
    def version(self) -> str:
        """Distribution and version, such as ``spconv-cu126 2.3.8``."""
        for name in self.distributions:
            try:
                return f"{name} {importlib.metadata.version(name)}"
            except importlib.metadata.PackageNotFoundError:
                continue
        return f"{self.name}, version unknown"

    @functools.cached_property
    def cases(self) -> dict[str, Case]:
        """All cases by name."""
        found = [case for name in self.modules for case in importlib.import_module(name).CASES]
        cases = {case.name: case for case in found}
        if len(cases) < len(found):
            names = [case.name for case in found]
            raise ValueError(f"two cases are called {max(names, key=names.count)!r}.")
        return cases


def _prepare_spconv(target: str) -> None:
    """Let spconv run on a CPU.

    spconv's forward pass is right on one thread only, because its scatter-add has a race. Its
    backward pass asks for a CUDA stream, also on a CPU.
    """
    # These parts of spconv warn: dense() indexes by a list, sparse_add makes a tensor of
    # torch.sparse, and the import asks for the default locale.
    for message in ("Using a non-tuple sequence", "Sparse invariant checks"):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="ccimport")
    if target == "cpu":
        torch.set_num_threads(1)
        ops = importlib.import_module("spconv.pytorch.ops")
        vars(ops)["get_current_stream"] = lambda: 0


def _prepare_minkowski(target: str) -> None:
    """Let MinkowskiEngine be imported: it takes ``Sequence`` from ``collections``."""
    vars(collections)["Sequence"] = collections.abc.Sequence
    warnings.filterwarnings("ignore", message="The MinkowskiEngine was compiled with CPU_ONLY")
    if target == "cpu":
        torch.set_num_threads(1)


def _minkowski_has_gpu() -> bool:
    return importlib.import_module("MinkowskiEngineBackend._C").is_cuda_available()


def _spconv_has_gpu() -> bool:
    return not importlib.import_module("spconv.cppconstants").CPU_ONLY_BUILD


ORIGINALS = {
    "spconv": Original(
        name="spconv",
        adapter="compat.spconv",
        distributions=("spconv", *(f"spconv-cu{v}" for v in ("120", "121", "124", "126"))),
        modules=tuple(
            f"tests.parity.cases.spconv_{name}"
            for name in ("layers", "chains", "tensor", "points", "networks", "precision")
        ),
        prepare=_prepare_spconv,
        has_gpu=_spconv_has_gpu,
    ),
    "MinkowskiEngine": Original(
        name="MinkowskiEngine",
        adapter="compat.minkowski",
        distributions=("MinkowskiEngine",),
        modules=tuple(
            f"tests.parity.cases.minkowski_{name}"
            for name in ("surface", "layers", "tensor", "networks")
        ),
        prepare=_prepare_minkowski,
        has_gpu=_minkowski_has_gpu,
        golden_target="cpu",
    ),
}


def describe(name: str, target: str) -> str:
    """Return versions and device, as this interpreter sees them, as JSON.

    Raises:
        RuntimeError: The original cannot run here.
    """
    absence = ORIGINALS[name].absence(target)
    if absence:
        raise RuntimeError(absence)
    setting = {
        "original": ORIGINALS[name].version,
        "device": torch.cuda.get_device_name() if target == "cuda" else "CPU, one thread",
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    return json.dumps(setting)
