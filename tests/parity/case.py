"""A parity case: a function that builds and runs something on either library."""

from __future__ import annotations

import contextlib
import importlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GRAD = "grad "  # names of gradients start so
NUDGE = 16  # roundings
STEPS = 20  # of training
FAILS = ("original error",)  # for `Quirk.covers`: the original fails and the adapter works
IN_THE_CASE = " (in the case itself)"  # part of an error that no library raised


@dataclass(frozen=True)
class Quirk:
    """An intended difference: a line of the adapter's ``QUIRKS.md`` and the results it explains.

    Attributes:
        rule: Beginning of the line's first cell.
        covers: Names of tensors and facts that may differ, also ``"<name> shape"`` and
            ``"<name> dtype"``, ``"original error"`` and ``"adapter error"``.
        targets: Devices on which the libraries differ.
    """

    rule: str
    covers: tuple[str, ...]
    targets: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: Unique within its original; no spaces.
        function: Called with a `Run`; records the results to compare.
        dtypes: For each target the dtypes to compare in: names of torch, or ``amp-float16`` and
            ``amp-bfloat16`` for float32 under autocast. A target left out is not compared.
        exact: Bits must agree, in the one dtype listed; no float64 run is made.
        refuses: Both libraries must raise; an error of the case's own code does not count.
        nudges: Number of further runs of plain arithmetic. Each moves the inputs by ``NUDGE``
            roundings, about as many as the layers of a network add. Networks need these runs: a
            single plain run may have a small error by chance, and in training a ReLU that flips
            changes a step.
        fatal: The original may end its process, so it runs in a process of its own.
        quirks: Intended differences.
    """

    name: str
    function: Callable[[Run], None]
    dtypes: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"cpu": ("float64", "float32"), "cuda": ("float32", "float16")}
    )
    exact: bool = False
    refuses: bool = False
    nudges: int = 0
    fatal: bool = False
    quirks: tuple[Quirk, ...] = ()


@dataclass
class Recording:
    """The results of one library in one case.

    Attributes:
        tensors: Values by name, on the CPU. Names of gradients start with ``"grad "``.
        coords: Coordinates ``[N, 1+D]`` of the tensors that have a row per site.
        kept: Names in ``coords`` whose rows must come in the original's order.
        facts: Other values that must be equal: shapes, dtypes, names.
        error: Type and message, if the case raised or its process died.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    coords: dict[str, Tensor] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def canonical(coords: Tensor) -> Tensor:
    """Return row numbers in the order of batch and coordinates; equal rows keep their order."""
    columns = coords.detach().cpu().numpy().T[::-1]
    return torch.from_numpy(np.lexsort(columns)).to(coords.device)


@dataclass
class Run:
    """One run of a case: the library it runs on, seeded inputs, and the place for its results.

    The numbers depend on the case's name and on integer arithmetic alone, so they are the same on
    every machine, in every dtype: all are multiples of 2^-10 below one, exact in float16 too.

    Attributes:
        case: Name of the case.
        root: Import name of the library: ``spconv`` or ``compat.spconv``.
        original: True for the original library, False for the adapter.
        target: The device whose behaviour is compared: ``"cpu"`` or ``"cuda"``.
        device: Where this run computes; the float64 run of target ``"cuda"`` is on the CPU.
        precision: The dtype's name, see `Case`.
        nudge: If not 0, features are moved by ``NUDGE`` roundings, up or down; each number moves
            them in another way.
    """

    case: str
    root: str
    original: bool
    target: str
    device: torch.device
    precision: str
    nudge: int = 0
    recording: Recording = field(default_factory=Recording)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of features and parameters."""
        return getattr(torch, "float32" if self.amp else self.precision)

    @property
    def amp(self) -> torch.dtype | None:
        """The autocast dtype, or None."""
        name = self.precision.removeprefix("amp-")
        return getattr(torch, name) if name != self.precision else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast context of this run."""
        enabled = self.amp is not None
        return torch.autocast(self.device.type, self.amp, enabled=enabled)

    def module(self, name: str = "") -> ModuleType:
        """Import the library's module of that name."""
        return importlib.import_module(f"{self.root}.{name}" if name else self.root)

    # Inputs.

    def raw(self, name: str, n: int) -> np.ndarray:
        """Return ``n`` random uint64."""
        seed = zlib.crc32(f"{self.case} {name}".encode())
        return np.random.Philox(key=seed).random_raw(n)

    def values(self, name: str, *shape: int, scale: float = 1.0) -> Tensor:
        """Return uniform values in ``[-scale, scale)``, ``scale`` a power of two."""
        steps = (self.raw(name, math.prod(shape)) >> np.uint64(53)).astype(np.int64)
        values = torch.from_numpy((steps - 1024) / 1024.0 * scale).reshape(shape)
        return values.to(self.device, self.dtype)

    def feats(self, *shape: int) -> Tensor:
        """Return the values called ``"feats"``, nudged if this run asks for it."""
        return self.nudged(self.values("feats", *shape))

    def nudged(self, values: Tensor) -> Tensor:
        """Return a case's own features, nudged if this run asks for it."""
        if self.nudge:
            up = self.integers(f"nudge {self.nudge}", 2, *values.shape) * 2 - 1
            values = values * (1 + up * NUDGE * torch.finfo(self.amp or self.dtype).eps).to(values)
        return values

    def integers(self, name: str, high: int, *shape: int) -> Tensor:
        """Return int64 below ``high``."""
        drawn = (self.raw(name, math.prod(shape)) >> np.uint64(11)) % np.uint64(high)
        return torch.from_numpy(drawn.astype(np.int64)).reshape(shape).to(self.device)

    def sites(self, shape: Sequence[int], n: int, batch_size: int = 2, name: str = "") -> Tensor:
        """Return ``n`` distinct random cells ``(batch, *shape)``, int32, in random row order."""
        cells = batch_size * math.prod(shape)
        drawn = np.argsort(self.raw(f"sites {name}", cells), kind="stable")[: min(n, cells)]
        rows = np.stack(np.unravel_index(drawn, (batch_size, *shape)), 1).astype(np.int32)
        return torch.from_numpy(rows).to(self.device)

    def fill(self, module: nn.Module) -> nn.Module:
        """Give a module parameters that depend on their names, and this run's device and dtype."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                fan_in = parameter.numel() // parameter.shape[0]
                scale = 2.0 ** -round(math.log2(fan_in) / 2)
                values = self.values(f"parameter {name}", *parameter.shape, scale=scale)
                # Norms: around one.
                parameter.copy_(values + 1 if parameter.dim() == 1 and "weight" in name else values)
        return module.to(self.device, self.dtype)

    # Results.

    def tensor(self, name: str, value: Tensor) -> None:
        """Record a value as it is."""
        self.recording.tensors[name] = value.detach().cpu().clone()

    def rows(self, name: str, coords: Tensor, values: Tensor, kept: bool = False) -> None:
        """Record one row per site; ``kept``: both libraries must have the same order of rows."""
        self.tensor(name, values)
        self.recording.coords[name] = coords.detach().cpu().clone()
        if kept:
            self.recording.kept.append(name)

    def fact(self, name: str, value: Any) -> None:
        """Record plain data: numbers, strings and lists of them."""
        self.recording.facts[name] = value

    def backward(self, coords: Tensor, feats: Tensor, **inputs: Tensor) -> None:
        """Run backward from a seeded gradient and record the gradients of ``inputs``.

        The gradient of a row depends on its site, not on its place in ``feats``.
        """
        order = canonical(coords)
        grad = self.values("grad", *feats.shape).to(feats.dtype)
        feats.backward(torch.empty_like(feats).index_copy_(0, order, grad))
        for name, value in inputs.items():
            assert value.grad is not None, name
            self.tensor(GRAD + name, value.grad)

    def descend(self, network: nn.Module, loss_of: Callable[[], Tensor]) -> None:
        """Train for twenty steps; record the losses and the norms of the last state."""
        optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        losses = []
        for _ in range(STEPS):
            loss = loss_of()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        curve = torch.stack(losses)
        assert curve[-1] < curve[0], "the network must learn"
        self.tensor("losses", curve)
        state = network.state_dict().values()
        self.tensor("state norms", torch.stack([value.double().norm() for value in state]))


@contextlib.contextmanager
def assigned(owner: Any, **values: Any) -> Iterator[None]:
    """Assign attributes for a while."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def options_name(options: Mapping[str, Any]) -> str:
    """Return ``k3-s2`` and the like for a case's name."""
    parts = []
    for name, value in options.items():
        text = "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
        parts.append(f"{name}{text}")
    return "-".join(parts)
