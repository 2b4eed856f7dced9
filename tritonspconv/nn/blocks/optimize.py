"""Optimise the modules of a model whose ``forward`` calls convolutions, norms and ReLUs by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from tritonspconv.nn.blocks.forward import Plan, family_in, install, make_plans, uninstall
from tritonspconv.nn.blocks.record import Untraceable
from tritonspconv.nn.fusable import original_class

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class BlockReport:
    """The report of :func:`optimize` on one module.

    Attributes:
        name: Its name in the model; empty: the model itself.
        kind: The name of its class.
        chains: The chains that run as one call each, such as ``"conv1, bn1, relu"``.
        reason: The reason why the module is not optimised; None: it is optimised.
    """

    name: str
    kind: str
    chains: tuple[str, ...]
    reason: str | None


@dataclass(frozen=True)
class OptimizationReport:
    """The report of :func:`optimize` on a model: one entry for each module with convolutions.

    ``str(report)`` is a table to read.
    """

    blocks: tuple[BlockReport, ...]

    @property
    def num_chains(self) -> int:
        """The number of chains that run as one call."""
        return sum(len(block.chains) for block in self.blocks)

    def __str__(self) -> str:
        lines = []
        for block in self.blocks:
            title = f"{block.name or '(model)'} ({block.kind})"
            what = "; ".join(block.chains) if block.reason is None else f"left: {block.reason}"
            lines.append(f"{title}: {what}")
        return "\n".join(lines)


def optimize(model: Model) -> Model:
    """Fuse convolution, batch norm, addition and ReLU in hand-written blocks, for any later call.

    The ``forward`` of each module that calls sparse convolutions is recorded once, without running
    it. A *chain* is a convolution and behind it a batch norm, an addition (the residual of a
    block), a ReLU, or some of them in this order. The code may call them by attributes of the
    module or in a torch ``Sequential``. From then on the module runs a chain as one. That is one
    launch while gradients are off and the norm is in evaluation mode. In training it is one node of
    the autograd graph, with as few passes over the features as possible. Layers of
    :mod:`tritonspconv.nn`, ``compat.spconv`` and ``compat.minkowski`` are fused. The results equal
    the results of the model up to rounding.

    The model stays the same object, with the same modules, parameters, buffers and names. So
    optimisers, checkpoints, DDP, ``train()`` and ``eval()`` go on working, and you may freeze, hook
    or replace modules at any time. Each call decides again, from the current state of the modules,
    whether a chain can be fused. :func:`unoptimize` takes the change back.

    A module stays as it is if its code cannot be recorded. Such code decides by the values of
    tensors, sets attributes, enters contexts such as ``torch.no_grad`` and ``torch.autocast``, or
    uses ``torch.utils.checkpoint``. :func:`optimization_report` names these modules, with the
    reason. If code reads a value from elsewhere than its modules and arguments, such as a global,
    the value of now is kept.

    Args:
        model: A network. While this function runs, no other thread may use modules of torch.

    Returns:
        The model.
    """
    for _, module, plans in list(_optimizable(unoptimize(model))):
        if not isinstance(plans, str) and plans:
            install(module, plans)
    return model


def unoptimize(model: Model) -> Model:
    """Take back :func:`optimize`; return the model."""
    for module in model.modules():
        uninstall(module)
    return model


def optimization_report(model: nn.Module) -> OptimizationReport:
    """Return the result that :func:`optimize` has for each module, without changing the model."""
    blocks = []
    for name, module, plans in _optimizable(model):
        if isinstance(plans, str):
            chains, reason = (), plans
        else:
            chains = plans[0].chains if plans else ()
            reason = (
                None if plans else "no convolution is followed by a norm, an addition or a ReLU"
            )
        blocks.append(BlockReport(name, original_class(module).__name__, chains, reason))
    return OptimizationReport(tuple(blocks))


def _optimizable(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[Plan, ...] | str]]:
    """Yield name, module and plans, or the reason for none, of each module with convolutions.

    A module that has convolutions only in containers is left out unless it has plans, because
    containers fuse their children themselves.
    """
    for name, module in model.named_modules():
        family = family_in(module)
        kind = original_class(module)
        if family is None or issubclass(kind, (nn.ModuleList, nn.ModuleDict)):
            continue
        if kind.forward is not nn.Sequential.forward and family.is_container(module):
            # Containers fuse their children themselves, at every call.
            continue
        plans: tuple[Plan, ...] | str
        if "forward" in module.__dict__:
            plans = "somebody assigned a forward to it"
        else:
            try:
                plans = make_plans(module, family)
            except Untraceable as reason:
                plans = f"its forward {reason}"
        fused = not isinstance(plans, str) and plans
        if fused or family_in(module, in_containers=False) is not None:
            yield name, module, plans
