"""The libraries to compare: ours, and the installed originals."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

OURS = "ours"
ORIGINAL = "spconv"
# Our library comes first, because the ratios refer to its column.
MODULES = {OURS: "compat.spconv", ORIGINAL: "spconv", "spconv-triton": "spconv_triton"}


@dataclass(frozen=True)
class Peer:
    """A library with spconv's interface.

    Attributes:
        name: Key of ``MODULES``, and the head of its column.
        module: Its ``spconv.pytorch``.
        constants: Its ``spconv.constants``.
        algo: The argument ``algo`` of every layer; None leaves the choice to the library.
        version: Version of the installed distribution.
    """

    name: str
    module: ModuleType
    constants: ModuleType
    algo: Any
    version: str

    def tensor(self, feats: torch.Tensor, scene: Any) -> Any:
        """Return a sparse tensor with nothing cached: features at the sites of a scene."""
        return self.module.SparseConvTensor(
            feats, scene.indices, list(scene.spatial_shape), scene.batch_size
        )

    @contextlib.contextmanager
    def tf32(self, allowed: bool) -> Iterator[None]:
        """Let float32 layers multiply in TF32, or not."""
        before = self.constants.SPCONV_ALLOW_TF32
        setattr(self.constants, "SPCONV_ALLOW_TF32", allowed)  # noqa: B010
        try:
            yield
        finally:
            setattr(self.constants, "SPCONV_ALLOW_TF32", before)  # noqa: B010


def load_peer(name: str, device: torch.device) -> Peer:
    """Import a library.

    Raises:
        Exception: Any error of the library's import.
    """
    root = MODULES[name]
    module = importlib.import_module(f"{root}.pytorch")
    constants = importlib.import_module(f"{root}.constants")
    algo = None
    if name == ORIGINAL and device.type == "cpu":
        algo = module.ConvAlgo.Native
        # spconv's backward pass asks for a CUDA stream, which its CPU code does not use.
        vars(importlib.import_module(f"{root}.pytorch.ops"))["get_current_stream"] = lambda: 0
    return Peer(name, module, constants, algo, _version(root))


def find_peers(wanted: list[str], device: torch.device) -> tuple[list[Peer], dict[str, str]]:
    """Return the libraries that can be imported, and the reason for each that cannot."""
    peers, missing = [], {}
    for name in wanted:
        try:
            peers.append(load_peer(name, device))
        except Exception as error:  # a broken installation may raise anything
            missing[name] = first_line(error)
    return peers, missing


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _version(root: str) -> str:
    package = "tritonspconv" if root.startswith("compat") else root
    version = getattr(importlib.import_module(package), "__version__", None)
    if version is not None:
        return str(version)
    for distribution in importlib.metadata.packages_distributions().get(root, []):
        return f"{distribution} {importlib.metadata.version(distribution)}"
    return "unknown"
