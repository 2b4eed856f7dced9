"""Record the ``forward`` of one module as a torch.fx graph whose leaves are its child modules.

torch.fx runs ``forward`` once, with :class:`Recorded` values in place of tensors. A recording is
right for later calls only if the code takes the same way through ``forward`` every time. So it ends
with :class:`Untraceable` as soon as the code does something that a graph does not keep. For
example, the code may decide by the values of tensors, set attributes, compute with tensors of its
own, draw random numbers, or enter ``torch.no_grad``. Values that the code reads from modules, such
as ``self.training`` or ``self.downsample is None``, become guards (:class:`Guards`).
"""

from __future__ import annotations

import contextlib
import copy
import enum
import inspect
import operator
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from tritonspconv.guide import without_more
from tritonspconv.nn.blocks.guards import Guards
from tritonspconv.nn.blocks.recorded import Recorded, RecordedAttribute, holds_recorded
from tritonspconv.nn.blocks.watch import no_random_numbers, quiet_torch_fx, replaced
from tritonspconv.nn.fusable import LayerFamily, original_class

# The kinds of recorded values.
SPARSE, FEATURES, INPUT = "sparse", "features", "input"

_NO_MACHINERY = {"training"}
_MACHINERY = frozenset(nn.Module().__dict__) - _NO_MACHINERY
_CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
# Contexts that a graph would lose.
_CONTEXTS: tuple[type, ...] = (
    torch.autocast,
    torch.no_grad,
    torch.enable_grad,
    torch.inference_mode,
    saved_tensors_hooks,
    torch.cuda.StreamContext,
)
_RANK = 2


class Untraceable(Exception):
    """The code of a ``forward`` cannot be kept as a graph; the message says why."""


@dataclass
class Recording:
    """A ``forward`` as a graph.

    Attributes:
        graph: The graph; ``node.meta["kind"]`` is the known kind of a value.
        guards: The conditions that the recording relies on.
        num_inputs: The number of arguments, all positional, that it was recorded with.
    """

    graph: fx.Graph
    guards: Guards
    num_inputs: int


class Recorder(fx.Tracer):
    """Records one ``forward``."""

    proxy_buffer_attributes = True

    def __init__(self, family: LayerFamily, inline: frozenset[str]) -> None:
        super().__init__(autowrap_functions=tuple(family.functions))
        self.family = family
        self._inline = inline
        self.guards = Guards()
        self.tensor_names = family.tensor_names
        self.num_inputs = 0
        self.reason: str | None = None
        self._unused: list[RecordedAttribute] = []
        self._recording = False

    def refuse(self, reason: str) -> Any:
        """End the recording, even if the code catches the exception."""
        if self.reason is None:
            self.reason = reason
        raise Untraceable(reason)

    # Questions of the code about values

    def expect_sparse(self, value: Recorded, asked: str) -> None:
        """Rely on ``value`` being a sparse tensor, or end the recording."""
        kind = value._kind()
        if kind == INPUT:
            self.guards.inputs.add(value.node.meta["number"])
        elif kind != SPARSE:
            self.refuse(f"{asked} a value that is not known to be a sparse tensor")

    def class_of(self, value: Recorded) -> type:
        """Return the class that ``value`` will have.

        The class is never ``Tensor``, because torch's compiled code trusts ``isinstance`` for
        tensors.
        """
        self.expect_sparse(value, "asks for the type of")
        return self.family.tensor

    def attribute(self, owner: Recorded, name: str) -> Any:
        """Return an attribute of a recorded value."""
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        kind, known = owner._kind(), None
        if kind in (SPARSE, INPUT) and name in self.tensor_names:
            self.expect_sparse(owner, "reads")
            known = FEATURES if name in self.family.feature_names else None
        elif kind == SPARSE or not (hasattr(Tensor, name) or hasattr(dict, name) or (
            kind is None and name in self.tensor_names
        )):  # fmt: skip
            self.refuse(f"reads the attribute {name!r} of a value that may not have it")
        if kind == FEATURES:
            if name == "ndim":
                return _RANK
            if name in ("dim", "ndimension"):
                return lambda: _RANK
        made = RecordedAttribute(owner, name, known)
        if kind is None:
            self._unused.append(made)
        return made

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decisions by values of tensors cannot be recorded."""
        return self.refuse("decides by a value that is known only when it runs")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Loops over values of tensors cannot be recorded."""
        return self.refuse("loops over a value that is known only when it runs")

    # Questions of torch.fx

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the value that represents ``node``."""
        return Recorded(node, self)

    def create_arg(self, a: Any) -> Any:
        """Return an argument as the graph holds it."""
        if issubclass(type(a), Recorded):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            self.refuse("uses a tensor that is no parameter and no buffer")
        return super().create_arg(a)

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *more: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Record one operation."""
        if not torch.is_grad_enabled():
            self.refuse("turns gradients off")
        made = super().create_proxy(kind, target, args, kwargs, *more, **options)
        made.node.meta["kind"] = self._kind_of(kind, target, args)
        return made

    def _kind_of(self, kind: str, target: Any, args: tuple[Any, ...]) -> str | None:
        """Return the known kind of an operation's result."""
        family = self.family
        if (kind == "call_method" and target == family.replace) or target is family.tensor:
            return SPARSE
        first = args[0]._kind() if args and issubclass(type(args[0]), Recorded) else None
        if kind == "call_module":
            module = self.root.get_submodule(target)
            if family.is_conv_class(type(module)):
                return SPARSE
            if family.batch_norm(module) is not None or family.is_relu(module):
                return first
            return SPARSE if family.starts_with_conv(module) else None
        if target in (operator.add, operator.iadd) or target in family.relu_functions:
            return first if first in (SPARSE, FEATURES) else None
        return None

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Record the call of a child, or the calls of the children of a container to inline."""
        path = self.submodule_paths.get(m) if self.submodule_paths else None
        if path is None:
            self.refuse(f"calls a {type(m).__name__} that is no child of the module")
        assert path is not None
        parts = tuple(path.split("."))
        self.guards.kinds[parts] = original_class(m)
        if path not in self._inline:
            return self.create_proxy("call_module", path, args, kwargs)
        self.guards.inlined.add(parts)
        self.guards.lengths[parts] = len(m._modules)
        return forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return the values that ``module.attr`` reads from parameters, buffers and children."""
        if isinstance(attr_val, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            path = self.submodule_paths.get(attr_val) if self.submodule_paths else None
            if path is not None:
                self.guards.lengths[tuple(path.split("."))] = len(attr_val._modules)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make a value for each argument without a default; others keep their defaults."""
        arguments: list[Any] = [self.root]
        for name in list(inspect.signature(root_fn).parameters)[1:]:
            parameter = inspect.signature(root_fn).parameters[name]
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                self.refuse(f"takes the arguments {parameter}")
            if parameter.default is not parameter.empty:
                continue
            if parameter.kind is parameter.KEYWORD_ONLY:
                self.refuse(f"needs the keyword argument {name!r}")
            made = self.create_proxy("placeholder", name, (), {})
            made.node.meta.update(kind=INPUT, number=self.num_inputs)
            self.num_inputs += 1
            arguments.append(made)

        def watched(*args: Any) -> Any:
            with self._watch():
                return root_fn(*args)

        return watched, arguments

    # Questions of the code about modules

    def note(self, module: nn.Module, name: str, value: Any) -> None:
        """Guard an attribute of a module that the code has read."""
        if name in _MACHINERY or name.startswith("__") or isinstance(value, types.MethodType):
            return
        fields = object.__getattribute__(module, "__dict__")
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
            if name not in fields:
                return
        elif isinstance(value, nn.Module):
            return
        elif not _is_constant(value):
            self.refuse(
                f"reads {name!r}, a {type(value).__name__}, whose changes would go unnoticed"
            )
        path = self.submodule_paths.get(module) if self.submodule_paths else None
        if path is None:
            self.refuse(f"reads {name!r} of a {type(module).__name__} that is no child")
        assert path is not None
        parts = tuple(path.split(".")) if path else ()
        self.guards.values[parts, name] = copy.deepcopy(value)

    @contextlib.contextmanager
    def _watch(self) -> Iterator[None]:
        """Notice actions of the code other than computing with recorded values."""
        recorder = self
        if isinstance(self.root, nn.Sequential):
            self.guards.lengths[()] = len(self.root._modules)

        def read(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if recorder._recording:
                recorder._recording = False
                try:
                    recorder.note(module, name, value)
                finally:
                    recorder._recording = True
            return value

        def refuse_set(module: nn.Module, name: str, value: Any) -> None:
            recorder.refuse(f"sets the attribute {name!r} of a module")

        def refuse_enter(context: Any) -> None:
            recorder.refuse(f"enters the context {type(context).__name__}")

        with contextlib.ExitStack() as stack:
            watched = [
                (nn.Module, "__getattribute__", read),
                (nn.Module, "__setattr__", refuse_set),
            ]
            watched += [(context, "__enter__", refuse_enter) for context in _CONTEXTS]
            stack.enter_context(replaced(watched))
            stack.enter_context(_recorded_functions(self))
            stack.enter_context(_OwnTensors(self))
            stack.enter_context(no_random_numbers(self.refuse))
            stack.enter_context(quiet_torch_fx())
            self._recording = True
            stack.callback(setattr, self, "_recording", False)
            yield
        if any(not attribute.used for attribute in self._unused):
            self.refuse("asks whether a value has an attribute")


class _OwnTensors(TorchFunctionMode):
    """Ends the recording when the code computes with tensors that are not recorded."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not holds_recorded(args, kwargs):
            self._recorder.refuse(f"calls {getattr(func, '__name__', func)} on tensors of its own")
        return func(*args, **kwargs)


def record(root: nn.Module, family: LayerFamily, inline: frozenset[str] = frozenset()) -> Recording:
    """Record ``type(root).forward``.

    Args:
        root: The module.
        family: The layers that may be fused.
        inline: Paths of containers whose children are recorded in their place.

    Changes methods of ``nn.Module`` for the time of the recording, as torch.fx does: no other
    thread may use modules meanwhile.

    Raises:
        Untraceable: The code cannot be kept as a graph.
    """
    recorder = Recorder(family, inline)
    try:
        with torch.enable_grad():
            graph = recorder.trace(root)
    except Exception as error:
        # Code of users raises anything at all when it meets a recorded value.
        reason = recorder.reason or f"{type(error).__name__}: {without_more(str(error))}"
        raise Untraceable(reason) from error
    if recorder.reason is not None:
        raise Untraceable(recorder.reason)
    return Recording(graph, recorder.guards, recorder.num_inputs)


def _is_constant(value: Any) -> bool:
    """Return whether ``value`` can be compared with a copy of itself."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_constant, value))
    if isinstance(value, dict):
        return all(map(_is_constant, value.values()))
    return isinstance(value, _CONSTANTS)


def _recorded_functions(recorder: Recorder) -> Any:
    """Record calls of the library's functions, such as ``ME.cat``, as one operation each."""

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if holds_recorded(args, kwargs):
                return recorder.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    functions = set(recorder.family.functions)
    recording = [
        (module, name, recorded(value))
        for module in recorder.family.function_modules
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType) and value in functions
    ]
    return replaced(recording)
