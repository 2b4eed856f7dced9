"""Graph capture: ``torch.compile`` runs around our code; tracers and exporters are refused.

Kernel maps depend on the values of coordinates, and kernels read memory by address. A recorded
graph would hold the maps of one scan and give wrong numbers for the next one. So:

- :func:`make_opaque` marks the functions of a package for ``torch.compile``, which then calls them
  as they are and compiles the code around them.
- Layers that have registered operators are traced: while :func:`is_traced` is true, they call the
  operators of ``ops/registered.py``, which find their kernel map when they run.
- :func:`refuse_capture` raises :class:`GraphCaptureError` under every tool that records or
  transforms operations. Public operations and constructors of sparse tensors call it.

``docs/compile-export.md`` lists the tools.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch.autograd import forward_ad

from tritonspconv.guide import more
from tritonspconv.opaque_types import AVAILABLE

_ADVICE = (
    "Kernel maps depend on the values of coordinates: a recorded graph would hold those of one "
    "input and give wrong numbers for the next. Use torch.compile, which runs sparse operations as "
    "they are, or export the network by tritonspconv.export_program or export_onnx."
)
_TRANSFORMS_ADVICE = "Use tensors with requires_grad, and torch.autograd.grad or backward()."

# These functions are bound here, because a chain of attributes takes longer than the checks.
_is_tracing = torch._C._is_tracing
_num_modes = torch._C._len_torch_dispatch_stack
_is_transforming = torch._C._are_functorch_transforms_active
# Releases without this flag export only through a dispatch mode.
_exporting: Any = (
    torch.compiler
    if hasattr(torch.compiler, "_is_exporting_flag")
    else types.SimpleNamespace(_is_exporting_flag=False)
)


class GraphCaptureError(RuntimeError):
    """A tool that records or transforms operations met a sparse operation."""


def refuse_capture(name: str) -> None:
    """Raise if a tool records or transforms the operations that run now.

    The check takes about 0.2 us and reads no tensor.

    Args:
        name: Name of the function that the user called, for the message.

    Raises:
        GraphCaptureError: Under ``torch.jit.trace``, ``torch.onnx.export``, ``torch.export``,
            ``make_fx``, ``FakeTensorMode``, forward-mode differentiation and the transforms of
            ``torch.func``.
    """
    if (
        _is_tracing()
        or _num_modes()
        or _is_transforming()
        or _exporting._is_exporting_flag
        or forward_ad._current_level >= 0
    ):
        _refuse(name)


def _refuse(name: str) -> None:
    """Raise for the tool that is active, unless it only watches."""
    if _is_tracing():
        raise GraphCaptureError(
            f"{name}: torch.jit.trace and torch.onnx.export cannot record sparse operations. "
            f"{_ADVICE}" + more("cannot-record")
        )
    if _is_transforming():
        raise GraphCaptureError(
            f"{name}: the transforms of torch.func (grad, vjp, jvp, vmap) do not apply to sparse "
            f"operations. {_TRANSFORMS_ADVICE}" + more("cannot-record")
        )
    keys = torch._C._TorchDispatchModeKey
    modes = (torch._C._get_dispatch_mode(key) for key in (keys.PROXY, keys.FAKE))
    if _exporting._is_exporting_flag or any(mode is not None for mode in modes):
        raise GraphCaptureError(
            f"{name}: torch.export, make_fx and FakeTensorMode cannot record sparse operations. "
            f"{_ADVICE}" + more("cannot-record")
        )
    if forward_ad._current_level >= 0:
        raise GraphCaptureError(
            f"{name}: sparse operations have no forward-mode derivative. {_TRANSFORMS_ADVICE}"
            + more("cannot-record")
        )


def is_traced() -> bool:
    """Return True while ``torch.compile`` traces the caller, False whenever Python runs it.

    False for ``torch.export`` too, which would keep the kernel maps of one input.
    """
    # Under torch.compile of torch 2.11, is_exporting() is true; the flag is not.
    return AVAILABLE and torch.compiler.is_dynamo_compiling() and not _exporting._is_exporting_flag


def run_untraced(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function in Python; where ``torch.compile`` traces the call, the graph breaks."""
    return function(*args, **options)


def breaks_graph(kind: type[nn.Module]) -> bool:
    """Return whether ``torch.compile`` runs modules of a class in Python, a graph break each."""
    return getattr(kind.forward, "_torchdynamo_disable", False)


def make_opaque(package: str, traceable: Sequence[str] = (), constant: Sequence[str] = ()) -> None:
    """Mark the functions, methods and module ``forward`` that ``package`` defines.

    ``torch.compile`` calls a marked function as it is and compiles the code around the call, and
    ``torch.jit.script`` refuses it. A mark is an attribute, so an ordinary call takes no more time
    than before. A wrapper like ``torch.compiler.disable`` would take 1.2 us.

    Args:
        package: Name of an imported package. Modules that it imports later are not marked; only
            marked functions call them.
        traceable: Functions that ``torch.compile`` may trace, by qualified name: those that work
            on features alone, and those that call registered operators then.
        constant: Functions whose answer follows from their arguments alone, none of them a tensor.
            ``torch.compile`` calls them while it traces, and keeps the answer in the graph.
    """
    for name, module in list(sys.modules.items()):
        if name != package and not name.startswith(f"{package}."):
            continue
        for value in list(vars(module).values()):
            if getattr(value, "__module__", None) != name:
                continue
            if isinstance(value, types.FunctionType):
                functions = [value]
            elif isinstance(value, type):
                functions = _functions_of(value)
            else:
                continue
            for function in functions:
                if function.__qualname__ in constant:
                    # As torch.compiler.assume_constant_result does, which imports torch._dynamo.
                    function._dynamo_marked_constant = True  # pyright: ignore
                elif function.__qualname__ not in traceable:
                    mark_opaque(function)
                elif function is value:
                    refuse_script(function)


def _functions_of(kind: Any) -> list[types.FunctionType]:
    """Return the functions of a class that are to be marked."""
    if issubclass(kind, nn.Module):
        layer: Any = kind
        layer._slow_forward = _slow_forward
        layer.__prepare_scriptable__ = _refuse_script
        members = [vars(kind).get("forward")]
    else:
        members = list(vars(kind).values())
    # Static and class methods hold their function in ``__func__``.
    members = [getattr(member, "__func__", member) for member in members]
    return [member for member in members if isinstance(member, types.FunctionType)]


def mark_opaque(function: Any) -> None:
    """Mark a function for ``torch.compile``, as :func:`make_opaque` does."""
    # torch.compile reads these attributes where a function that it traces calls this one.
    function._torchdynamo_disable = True
    # Functions are marked at import, which must not read metadata as `more` does.
    told = f"a sparse operation. {_ADVICE} More: tritonspconv explain cannot-record"
    function._torchdynamo_disable_msg = told
    # torch.compile asks for this strategy where Python calls the function.
    _skip_frames(function.__code__)
    refuse_script(function)


def refuse_script(function: Any) -> None:
    """Make ``torch.jit.script`` refuse a function."""
    function.__prepare_scriptable__ = functools.partial(_refuse_script, function)


def _skip_frames(code: types.CodeType) -> None:
    """Tell torch.compile not to compile frames of this code, nor the functions that they call."""
    # These are private names of torch. In a release without them, results are right but compilation
    # is slow.
    if hasattr(eval_frame, "set_code_exec_strategy"):
        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        eval_frame.set_code_exec_strategy(code, strategy)


def _slow_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand in for the method that ``nn.Module`` calls while ``torch.jit.trace`` records."""
    if all(isinstance(arg, torch.Tensor) for arg in (*args, *kwargs.values())):
        # The module is a layer of dense tensors, or it makes a sparse tensor from dense ones, which
        # raises.
        return nn.Module._slow_forward(self, *args, **kwargs)
    return refuse_capture(type(self).__name__)


def _refuse_script(target: Any) -> NoReturn:
    """Raise; ``torch.jit.script`` calls this before it compiles a module or a function."""
    name = type(target).__name__ if isinstance(target, nn.Module) else target.__qualname__
    raise GraphCaptureError(
        f"{name}: torch.jit.script cannot compile sparse operations. {_ADVICE}"
        + more("cannot-record")
    )
