"""Full backward hooks of modules that take and return sparse tensors.

Torch hooks the tensors among a module's arguments and results. A sparse tensor is no such tensor,
so this file puts the hooks on the features. A module without hooks runs unchanged.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import BackwardHook, RemovableHandle

from tritonspconv.sparse_tensor import SparseTensor

_ATTRIBUTE = "_feature_hooks"


class _Hooks(NamedTuple):
    """The hooks of a module by the number of their handle: before and after its gradient."""

    before: OrderedDict[int, Callable[..., Any]]
    after: OrderedDict[int, Callable[..., Any]]


def add_hook(
    module: nn.Module, hook: Callable[..., Any], *, before: bool, prepend: bool
) -> RemovableHandle:
    """Call ``hook`` in every backward pass through ``module``.

    Args:
        module: Its ``forward`` takes and returns sparse tensors or tensors.
        hook: A function like a backward hook of torch. Its arguments are the module, the gradients
            of the inputs and the gradients of the outputs. With ``before`` its arguments are the
            module and the gradients of the outputs.
        before: Call it before the gradient of the inputs is computed.
        prepend: Call it before the existing hooks.

    Returns:
        A handle that removes the hook.
    """
    hooks: _Hooks | None = module.__dict__.get(_ATTRIBUTE)
    if hooks is None:
        hooks = _Hooks(OrderedDict(), OrderedDict())
        setattr(module, _ATTRIBUTE, hooks)
        # Only this module gets another forward, so calls of other modules need no check for hooks.
        module.__dict__["forward"] = functools.partial(_forward, module)
    kept = hooks.before if before else hooks.after
    handle = RemovableHandle(kept)
    kept[handle.id] = hook
    if prepend:
        kept.move_to_end(handle.id, last=False)
    return handle


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run ``forward`` of the module's class with the hooks on the features."""
    hooks: _Hooks = module.__dict__[_ATTRIBUTE]
    run = type(module).forward
    if not hooks.before and not hooks.after:
        return run(module, *args, **kwargs)
    hook = BackwardHook(module, list(hooks.after.values()), list(hooks.before.values()))
    args = _on_features(args, hook.setup_input_hook)
    result = run(module, *args, **kwargs)
    if isinstance(result, tuple):
        return _on_features(result, hook.setup_output_hook)
    return _on_features((result,), hook.setup_output_hook)[0]


def _on_features(values: tuple[Any, ...], attach: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Return the values with the tensors that ``attach`` makes of their features."""
    places = [place for place, value in enumerate(values) if _has_features(value)]
    feats = attach(tuple(_features(values[place]) for place in places))
    made = list(values)
    for place, new in zip(places, feats, strict=True):
        old = values[place]
        made[place] = old.replace(new) if isinstance(old, SparseTensor) else new
    return tuple(made)


def _has_features(value: Any) -> bool:
    return isinstance(value, (SparseTensor, Tensor))


def _features(value: Any) -> Tensor:
    return value.feats if isinstance(value, SparseTensor) else value
