"""Record one run of a network as a :class:`~tritonspconv.export.onnx.graph.Graph`.

The network runs on an example. Its tensors are :class:`Rows`, or :class:`Dense` behind a
``dense()``. These classes see every torch function and every operation of the engine that is
applied to them. A function with a rule becomes nodes of the graph, and any other function ends the
export with an error. Python numbers and branches that depend on values or on the number of rows
also end it, and so do tensors that are neither results of the run nor parameters or buffers: a file
with these would hold numbers of one scan.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from tritonspconv.coords import Grid
from tritonspconv.coords.row_tensor import RowBounds, plain
from tritonspconv.coords.site_plan import SitePlan
from tritonspconv.export.onnx.errors import (
    OnnxExportError,
    is_library,
    library_call,
    name_of,
    user_line,
)
from tritonspconv.export.onnx.graph import Graph, Node
from tritonspconv.export.onnx.values import Args, Cell, Dense, Function, RowCount, Rows, as_plain
from tritonspconv.ops.rowwise import reads_no_values

Kwargs = dict[str, Any]
Rule = Callable[["Recorder", Function, Args, Kwargs], Any]

# Functions that tell how many rows there are.
_COUNTS = ("shape", "size", "__len__", "numel", "nelement", "nbytes")
# Properties and methods of sparse tensors that only pass on facts about the features.
_ACCESSORS = ("shape", "size", "__len__", "num_rows")
# Code between a tensor and the code that reads it.
_PASS_ON = (
    "tritonspconv.export.onnx.trace", "tritonspconv.export.onnx.values", "torch.overrides",
)  # fmt: skip
_RANDOM = ("rand", "normal", "bernoulli", "multinomial", "dropout", "empty", "poisson")


class _Plan(SitePlan):
    """Lets sites made of rows show their coordinates as :class:`Rows`."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.show_rows = recorder.show_rows

    def recall(self, ask: Callable[[], Any], assumed: Any = None) -> NoReturn:
        """Refuse: the file would hold the answer of one scan."""
        self.recorder.refuse("takes numbers of the coordinates, which differ from scan to scan")


class Recorder:
    """One recorded run.

    Args:
        model: The network.
        rules: Rules by function.
        dense: The recorder of dense code.

    Attributes:
        graph: The nodes recorded so far.
        integers: The integer tensors so far, among which coordinates are found.
        site_sets: The sets of sites so far; see :mod:`tritonspconv.export.onnx.sparse`.
        indice_keys: Names of the relations between them so far.
        row_names: Names of the numbers of rows so far.
        dense: The recorder of dense code.
        batch_size: Samples of bounded grids; None: there was none yet.
        failed_in: The module in which code raised an error; None: there was none.
    """

    def __init__(self, model: nn.Module, rules: dict[Function, Rule], dense: Any) -> None:
        self.graph = Graph()
        self.integers: list[tuple[str, Tensor, RowBounds]] = []
        self.site_sets: dict[int, Any] = {}
        self.indice_keys: dict[Any, str] = {}
        self.row_names: dict[int, str] = {}
        self.dense = dense
        self.failed_in: str | None = None
        self.batch_size: int | None = None
        self._rules = rules
        self._plan = _Plan(self)
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._stack: list[nn.Module] = []
        self._taken: set[str] = set()
        self._constants = WeakIdKeyDictionary()
        self._named: dict[Any, str] = {}
        self._kept: list[Tensor] = []
        self._parameter_storage = {
            _storage(tensor): path
            for path, tensor in (*model.named_parameters(), *model.named_buffers())
        }

    # Errors and names

    @property
    def path(self) -> str:
        """The path of the module that runs, or of its caller if the module has no path."""
        paths = (self._paths.get(id(module), "") for module in reversed(self._stack))
        return next(filter(None, paths), "")

    @property
    def where(self) -> str:
        """The module that runs, for messages."""
        if not self._stack:
            return "the network"
        names = [type(self._stack[-1]).__name__]
        for module in reversed(self._stack):
            if path := self._paths.get(id(module), ""):
                kind = type(module).__name__
                inner = "" if module is self._stack[-1] else f" > {names[0]}"
                return f"{path} ({kind}){inner}"
        return names[0]

    @property
    def module(self) -> nn.Module | None:
        """The module that runs."""
        return self._stack[-1] if self._stack else None

    def refuse(self, reason: str) -> NoReturn:
        """End the export.

        Raises:
            OnnxExportError: Always; it names the module that runs and the line of the user.
        """
        raise OnnxExportError(f"export_onnx: {self.where} {reason}{library_call()}.{user_line()}")

    def fresh(self, hint: str) -> str:
        """Return a name that no value and no node has yet."""
        return self.unique(f"{self.path}.{hint}" if self.path else hint)

    def unique(self, base: str) -> str:
        """Return ``base``, with a number behind it if it is taken."""
        name, number = base, 1
        while name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        return name

    # Values

    def new_bounds(self) -> RowBounds:
        """Return bounds that stand for one set of rows."""
        return RowBounds(None, self._plan)

    def rows(self, x: Tensor, name: str | None, bounds: RowBounds) -> Rows:
        """Return a tensor as a value of the graph."""
        with torch._C.DisableTorchFunction():
            made = plain(x).detach().as_subclass(Rows)
        made.bounds, made.cell = bounds, Cell(name)
        if name is not None and not (x.is_floating_point() or x.is_complex()):
            self.integers.append((name, plain(x), bounds))
        return made

    def show_rows(self, x: Tensor, bounds: RowBounds) -> Rows:
        """Return the rows that user code sees in place of coordinates of the engine."""
        # The node that makes the coordinates may not exist yet: see name_of.
        return x if isinstance(x, Rows) else self.rows(x, None, bounds)

    def note_grid(self, grid: Grid) -> None:
        """Keep the batch size of a bounded grid, which the file will have."""
        if not grid.bounded or self.batch_size == grid.batch_size:
            return
        if self.batch_size is not None:
            self.refuse(f"uses batch sizes {self.batch_size} and {grid.batch_size} in one run")
        self.batch_size = grid.batch_size

    def share(self, x: Tensor, source: Rows) -> Rows:
        """Return a tensor on the memory of another one, as the same value."""
        made = self.rows(x, None, source.bounds)
        made.cell = source.cell
        return made

    def emit(
        self, op: str, inputs: list[str], attributes: dict[str, Any] | None = None, *,
        domain: str = "", extra_outputs: tuple[str, ...] = (), hint: str = "",
    ) -> str:  # fmt: skip
        """Add a node and return the name of its first output."""
        name = self.fresh(hint or op)
        outputs = [name, *extra_outputs]
        self.graph.nodes.append(Node(op, inputs, outputs, attributes or {}, domain, name))
        return name

    def name_of(self, x: Rows | Dense) -> str:
        """Return the value that a tensor holds."""
        if x.cell.name is None:
            found = self.site_sets.get(id(x.bounds)) if isinstance(x, Rows) else None
            if found is None or x.dtype != torch.int32 or not torch.equal(plain(x), found.coords):
                self.refuse("uses coordinates in a form that the file does not have")
            assert found is not None
            x.cell.name = found.name
        return x.cell.name  # pyright: ignore[reportReturnType]

    # Constants

    def constant(self, value: Tensor, hint: str, key: Any = None) -> str:
        """Return the name of a constant; equal keys share one."""
        if key is not None and key in self._named:
            return self._named[key]
        hint = self.unique(hint)
        self.graph.constants[hint] = (
            plain(value).detach().clone(memory_format=torch.contiguous_format)
        )
        if key is not None:
            self._named[key] = hint
        return hint

    def parameter(self, value: Tensor, dtype: torch.dtype, *, flat: bool = False) -> str:
        """Return the name of a tensor that no scan changes, in one dtype, ``flat``: as a vector."""
        self.expect_constant(value)
        path = self.path_of(value) or (f"{self.path}.constant" if self.path else "constant")
        key = (self.identity(value), dtype, flat)
        return self.constant((value.reshape(-1) if flat else value).to(dtype), path, key)

    def path_of(self, value: Tensor) -> str:
        """Return the name of a parameter or buffer in the model; "" for other tensors."""
        return self._parameter_storage.get(_storage(value), "")

    def identity(self, value: Tensor) -> tuple[Any, ...]:
        """Return a key that identifies a constant within this run."""
        if not self.path_of(value):
            # Freed memory may become the memory of another tensor.
            self._kept.append(value)
        return _storage(value), value.storage_offset(), value.shape, value.stride()

    def expect_constant(self, value: Any) -> None:
        """Raise unless a tensor is a parameter, a buffer, or computed from those alone."""
        if isinstance(value, (Rows, Dense)):
            self.refuse("uses a tensor of the scan where the file needs a weight")
        if _storage(value) not in self._parameter_storage and value not in self._constants:
            self.refuse(
                f"uses a tensor {list(value.shape)} that is no parameter and no buffer and was not "
                "computed from those: it may hold values of this scan. Register it as a buffer"
            )

    # Calls

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Apply a function to tensors of the run."""
        if reads_no_values(func):
            return self._metadata(func, args, kwargs)
        rule = self._rules.get(func)
        leaves = pytree.arg_tree_leaves(*args, **kwargs)
        if any(isinstance(leaf, Dense) for leaf in leaves):
            if any(isinstance(leaf, Rows) for leaf in leaves):
                self.refuse(f"calls {name_of(func)} on rows and a dense tensor together")
            return self.dense.call(self, func, args, kwargs)
        if rule is None:
            self.refuse(f"calls {name_of(func)}, for which there is no ONNX node here")
        return rule(self, func, args, kwargs)

    def run(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Compute a function on ordinary tensors."""

        def ordinary(leaf: Any) -> Any:
            return as_plain(leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = pytree.tree_map(ordinary, (args, kwargs))
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)

    def _metadata(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Read a shape, a dtype, a device; users see no number of rows."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__  # pyright: ignore[reportFunctionMemberAccess]
        found, x = self.run(func, args, kwargs), args[0]
        if name not in _COUNTS or not isinstance(x, Rows) or not _asked_by_user():
            return found
        if name == "shape":
            return (RowCount(self, x.bounds), *found[1:])
        if name == "size":
            axis = args[1] if len(args) > 1 else kwargs.get("dim")
            if axis is None:
                return (RowCount(self, x.bounds), *found[1:])
            return RowCount(self, x.bounds) if axis % x.dim() == 0 else found
        if name == "__len__":
            self.refuse("asks for the number of rows, which differs from scan to scan")
        return RowCount(self, x.bounds)

    # The run

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Watch the modules and functions that run inside the ``with`` block."""
        handles = [
            register_module_forward_pre_hook(lambda module, _: self._stack.append(module)),
            register_module_forward_hook(lambda *_: self._leave(), always_call=True),
        ]
        try:
            with torch.no_grad(), _Watch(self):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self) -> None:
        if sys.exc_info()[0] is not None and self.failed_in is None:
            self.failed_in = self.where
        self._stack.pop()

    def note(self, func: Function, args: Args, kwargs: Kwargs, out: Any) -> None:
        """Remember results that depend on parameters, buffers and numbers alone."""
        if any(word in name_of(func) for word in _RANDOM):
            return
        for leaf in pytree.arg_tree_leaves(*args, **kwargs):
            if isinstance(leaf, (Rows, Dense)):
                return
            if isinstance(leaf, Tensor) and not (
                _storage(leaf) in self._parameter_storage or leaf in self._constants
            ):
                return
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._constants[leaf] = True


class _Watch(TorchFunctionMode):
    """Tells the recorder about functions of tensors that are no values of the graph."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Function, types: Any, args: Args = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not reads_no_values(func):
            self._recorder.note(func, args, kwargs, out)
        return out


def _storage(x: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return x.untyped_storage()._cdata


def _asked_by_user() -> bool:
    """Return whether code of a user, not of torch or these packages, reads a tensor's size."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        ours = name.startswith(("tritonspconv.", "compat."))
        passes_on = name in _PASS_ON or (
            (ours or name == "torch._tensor") and frame.f_code.co_name in _ACCESSORS
        )
        if not passes_on:
            return not is_library(frame)
        frame = frame.f_back
    return False
