"""A ``forward`` that runs the chains of a module as one call each."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import linecache
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from tritonspconv.graph_capture import mark_opaque
from tritonspconv.nn.blocks.chains import Chain, ChainFinder
from tritonspconv.nn.blocks.guards import Guards, find
from tritonspconv.nn.blocks.record import Untraceable, record
from tritonspconv.nn.blocks.step import FusedStep
from tritonspconv.nn.fusable import (
    ORIGINAL_CLASS,
    LayerFamily,
    family_of,
    fuses_now,
    original_class,
)

_PLANS = "_fusion_plans"


@dataclass(frozen=True)
class Plan:
    """An optimised ``forward``, and when it may be used.

    Attributes:
        run: Called with the module twice and the arguments.
        guards: The conditions that must hold.
        num_inputs: The number of arguments.
        tensor: The type of sparse tensors.
        chains: The chains that it fuses, as text.
    """

    run: Callable[..., Any]
    guards: Guards
    num_inputs: int
    tensor: type
    chains: tuple[str, ...]

    def fits(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """Return whether this plan gives the result that ``forward`` would give now."""
        return (
            len(args) == self.num_inputs
            and all(isinstance(args[number], self.tensor) for number in self.guards.inputs)
            and self.guards.hold(module)
        )


class Plans:
    """The plans of one module: for evaluation and training, where they differ.

    Copies of a module share them, because they hold no modules. Their code cannot be pickled: an
    unpickled module makes them again at its first call.
    """

    def __init__(self, plans: tuple[Plan, ...] | None) -> None:
        self._plans = plans

    def of(self, module: nn.Module) -> tuple[Plan, ...]:
        """Return the plans of ``module``."""
        if self._plans is None:
            family = family_in(module)
            try:
                self._plans = () if family is None else make_plans(module, family)
            except Untraceable:
                self._plans = ()
        return self._plans

    def __deepcopy__(self, memo: dict[int, Any]) -> Plans:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Plans, (None,)


@functools.lru_cache(maxsize=256)
def optimized_class(original: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module of class ``original`` gets while it is optimised.

    It has the name of ``original`` and differs in ``forward``, which runs the first plan whose
    guards hold. The ``forward`` of ``original`` runs if there is none, and while something watches
    or traces all modules.
    """

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and fuses_now():
            for plan in self.__dict__[_PLANS].of(self):
                if plan.fits(self, args):
                    return plan.run(self, self, *args)
        return original.forward(self, *args, **kwargs)

    mark_opaque(forward)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        make, arguments, *rest = original.__reduce_ex__(self, protocol)
        own = original_class(self) is original
        if own and make is copyreg.__newobj__:  # pyright: ignore[reportAttributeAccessIssue]
            # The class has no name under which pickle would find it.
            make, arguments = _new, (original,)
        return (make, arguments, *rest)

    fields = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        ORIGINAL_CLASS: original,
    }
    return type(original.__name__, (original,), fields)


def _new(original: type[nn.Module]) -> nn.Module:
    """Return an empty optimised module, which unpickling and copying fill."""
    kind = optimized_class(original)
    return kind.__new__(kind)


def install(module: nn.Module, plans: tuple[Plan, ...]) -> None:
    """Make ``module`` run ``plans``."""
    module.__dict__[_PLANS] = Plans(plans)
    # Classes of users may refuse to have attributes set.
    object.__setattr__(module, "__class__", optimized_class(original_class(module)))


def uninstall(module: nn.Module) -> None:
    """Make ``module`` run the ``forward`` of its own class again."""
    kind = original_class(module)
    if kind is not type(module):
        object.__setattr__(module, "__class__", kind)
        del module.__dict__[_PLANS]


def family_in(module: nn.Module, *, in_containers: bool = True) -> LayerFamily | None:
    """Return the family of the convolutions that ``module`` itself may call, or None.

    A module may call its children. It may also call the children of its lists of modules and of its
    ``torch.nn.Sequential`` containers.

    Args:
        module: The module.
        in_containers: Also look into other containers that run their children in order.
    """
    families = set()
    for child in module._modules.values():
        if child is None:
            continue
        family = family_of(child)
        if family is None:
            inner = family_in(child, in_containers=in_containers)
            plain = isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
            if plain or (in_containers and inner is not None and inner.is_container(child)):
                family = inner
        if family is not None:
            families.add(family)
    return families.pop() if len(families) == 1 else None


def make_plans(module: nn.Module, family: LayerFamily) -> tuple[Plan, ...]:
    """Record ``module.forward`` and fuse its chains.

    Returns:
        One plan, or two if the code reads ``training`` of a module; none if there is no chain.

    Raises:
        Untraceable: The code cannot be kept as a graph.
    """
    plan = _plan(module, family)
    plans = [plan]
    reads_mode = plan.guards.reads_mode()
    if reads_mode:
        modules = [find(module, path) for path in reads_mode]
        modes = [each.training for each in modules]
        try:
            for each, mode in zip(modules, modes, strict=True):
                each.training = not mode
            plans.append(_plan(module, family))
        finally:
            for each, mode in zip(modules, modes, strict=True):
                each.training = mode
    return tuple(plan for plan in plans if plan.chains)


def _plan(module: nn.Module, family: LayerFamily) -> Plan:
    """Record ``module.forward`` in the present modes and fuse its chains."""
    recording = record(module, family)
    finder = ChainFinder(recording, module, family)
    chains = finder.find()
    inline = finder.containers_to_inline()
    if inline:
        with contextlib.suppress(Untraceable):
            recording = record(module, family, inline)
            chains = ChainFinder(recording, module, family).find()
    for chain in chains:
        for stage in chain.stages:
            for path in (chain.conv, stage.path):
                # The step checks these modules itself, at every call.
                recording.guards.kinds.pop(path, None) if path is not None else None
    _replace_chains(recording.graph, chains, family)
    for node in recording.graph.nodes:
        if node.op == "call_function" and node.target in family.functions:
            node.target = _Function(node.target)
    name = f"optimised forward of {original_class(module).__name__}"
    return Plan(
        _compiled(recording.graph, name), recording.guards, recording.num_inputs, family.tensor,
        tuple(map(str, chains)),
    )  # fmt: skip


def _replace_chains(graph: fx.Graph, chains: list[Chain], family: LayerFamily) -> None:
    """Put one call in place of each chain; the graph gets the module as its first argument."""
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        root = graph.placeholder("root_module")
    replaced: dict[fx.Node, fx.Node] = {}
    for chain in chains:
        last = chain.nodes[-1]
        residual = [stage.residual for stage in chain.stages if stage.residual is not None]
        inputs = [replaced.get(node, node) for node in (chain.input, *residual)]
        with graph.inserting_before(last):
            made = graph.call_function(FusedStep(chain, family), (root, *inputs))
        last.replace_all_uses_with(made)
        replaced[last] = made
        for node in reversed(chain.nodes):
            graph.erase_node(node)


class _Function:
    """Calls a function of the library in compiled code.

    torch.fx writes functions by their qualified names. Some functions of the libraries have the
    names of the torch functions that they wrap.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self.__name__ = function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


def _compiled(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """Return the graph as a function of the module and the arguments."""
    code = graph.python_code("self")
    # Each text gets its own name, so that tracebacks show the lines of the text that ran.
    name = f"<{name} {zlib.crc32(code.src.encode()):08x}>"
    scope = dict(code.globals)
    exec(compile(code.src, name, "exec"), scope)
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    return scope["forward"]
