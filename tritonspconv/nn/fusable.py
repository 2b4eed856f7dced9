"""The rule of fusion: which modules may be fused into a convolution.

Three things run a batch norm and a ReLU as part of the convolution before them: the containers
(:mod:`tritonspconv.nn.chain`), :func:`tritonspconv.optimize` and :func:`tritonspconv.fuse`. Fusion
does not call the modules that it takes up. So it is right only where a call would run the
``forward`` that this library knows, on tensors that the module itself holds, and nothing else.
This file decides that, for all three.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from tritonspconv.kernels.channel_norm import ChannelNorm, TrainingNorm

Norm = ChannelNorm | TrainingNorm

_MODULE_CALL = nn.Module.__call__

# The attribute of an optimised module's class that holds the module's former class.
ORIGINAL_CLASS = "_fusion_original_class"


class FusableConv(Protocol):
    """A convolution that can normalise its output, add a residual to it and clamp it."""

    out_channels: int

    @property
    def is_linear(self) -> bool:
        """True if the output is affine in the input: no activation is part of the layer."""
        ...

    def layer_family(self) -> LayerFamily:
        """Return the family that the layer belongs to."""
        ...

    def forward_fused(self, input: Any, norm: Norm | None, relu: bool, residual: Any = None) -> Any:
        """Return what ``forward``, a batch norm, an addition and a ReLU return, in that order.

        Args:
            input: The sparse tensor that ``forward`` takes.
            norm: The batch norm; None: there is none.
            relu: True: a ReLU comes last.
            residual: A tensor that is added before the ReLU; None: nothing is added.
        """
        ...

    def trace_fused(self, input: Any, norm: Norm | None, relu: bool) -> Any:
        """Do as :meth:`forward_fused`, in operations that ``torch.compile`` traces.

        Only containers call this method, so only layers whose containers are traced need it.
        """
        ...

    def residual_of(self, input: Any, other: Any) -> Tensor | None:
        """Return the features of ``other`` if ``forward(input) + other`` adds them row by row.

        The result is None in every other case: the two may have different sites, or ``other`` is no
        tensor.
        """
        ...

    def fold_scale_shift(self, scale: Tensor, shift: Tensor) -> None:
        """Make the output ``scale * output + shift``, both ``[c_out]``."""
        ...

    def fold_relu(self) -> None:
        """Make the output ``relu(output)``."""
        ...


class LayerFamily:
    """The layers of one library that fusion knows.

    A convolution names its family, and a family names the containers that hold convolutions. So a
    family is made in a file that both import, and its layers :meth:`join` it where all of them are
    defined.

    Args:
        tensor: The type of its sparse tensors.
        features: The attribute of ``tensor`` that holds the features.
        feature_names: Attributes of ``tensor`` that return the features.
        replace: The method of ``tensor`` that returns a tensor with other features; None: there is
            none.
    """

    def __init__(
        self,
        tensor: type,
        features: str,
        *,
        feature_names: Iterable[str] = (),
        replace: str | None = None,
    ) -> None:
        self.tensor = tensor
        self.features: Callable[[Any], Tensor] = operator.attrgetter(features)
        self.feature_name = features
        self.feature_names = frozenset(feature_names)
        self.replace = replace

    def join(
        self,
        convs: Iterable[type[nn.Module]],
        norms: Mapping[type[nn.Module], str | None],
        relus: Mapping[type[nn.Module], str | None],
        containers: Iterable[type[nn.Module]],
        *,
        function_modules: Iterable[ModuleType] = (),
        relu_functions: Iterable[Callable[..., Any]] = (),
    ) -> None:
        """Name the layers of the family, once.

        Name each class of the library that overrides ``forward``: fusion leaves all others alone.
        ``tests/nn/test_families.py`` finds the classes that were forgotten.

        The family remembers each class's ``forward`` as it is now. If somebody patches ``forward``
        on a class later, fusion leaves that class alone.

        Args:
            convs: Base classes of the convolutions, each a :class:`FusableConv`. A derived class
                counts as long as it inherits ``forward``.
            norms: Classes of batch norms. A class that wraps a torch module maps to the name of the
                attribute that holds it; any other class maps to None. Derived classes do not count.
            relus: Classes of ReLUs, in the same way.
            containers: Classes that run their children in order. A derived class counts as long as
                it inherits ``forward``.
            function_modules: Modules of functions on sparse tensors that change no argument.
            relu_functions: The members of ``function_modules`` that are ReLUs.
        """
        self._convs: frozenset[Callable[..., Any]] = frozenset(kind.forward for kind in convs)
        self._norms = {kind: (kind.forward, inner) for kind, inner in norms.items()}
        self._relus = {kind: (kind.forward, inner) for kind, inner in relus.items()}
        self._containers: frozenset[Callable[..., Any]] = frozenset(
            kind.forward for kind in containers
        )
        self.function_modules = tuple(function_modules)
        self.functions = frozenset(
            value
            for module in self.function_modules
            for name, value in vars(module).items()
            if isinstance(value, FunctionType) and not name.startswith("_")
        )
        self.relu_functions: frozenset[Callable[..., Any]] = frozenset(
            (torch.relu, torch.relu_, F.relu, F.relu_, *relu_functions)
        )

    def with_features(self, value: Any, feats: Tensor) -> Any:
        """Return a sparse tensor like ``value`` with other features."""
        assert self.replace is not None
        return getattr(value, self.replace)(feats)

    @functools.cached_property
    def tensor_names(self) -> frozenset[str]:
        """Names of the attributes of every sparse tensor."""
        return frozenset((*dir(self.tensor), *inspect.signature(self.tensor.__init__).parameters))

    def is_conv_class(self, kind: type[nn.Module]) -> bool:
        """Return whether modules of class ``kind`` run the ``forward`` of a known convolution."""
        return kind.forward in self._convs

    def conv(self, module: nn.Module) -> FusableConv | None:
        """Return ``module`` if it is a convolution that may take up its followers, else None."""
        kind = type(module)
        if (
            kind.forward in self._convs
            and kind.__call__ is _MODULE_CALL
            and is_unwatched(module)
            and (conv := cast("FusableConv", module)).is_linear
        ):
            return conv
        return None

    def batch_norm(self, module: nn.Module) -> nn.BatchNorm1d | nn.SyncBatchNorm | None:
        """Return the torch batch norm that ``module`` is or wraps, or None if it is something else.

        The result is also None if the module runs other code than the ``forward`` of its class.
        """
        return _torch_module(module, self._norms)  # pyright: ignore[reportReturnType]

    def is_relu(self, module: nn.Module) -> bool:
        """Return whether ``module`` is a ReLU and a call runs nothing else."""
        return _torch_module(module, self._relus) is not None

    def is_container(self, module: nn.Module) -> bool:
        """Return whether a call of ``module`` runs its children in order and nothing else.

        Hooks of the container itself do not matter: they see what enters and leaves it.
        """
        kind = original_class(module)
        return (
            kind.forward in self._containers
            and kind.__call__ is _MODULE_CALL
            and "forward" not in module.__dict__
        )

    def starts_with_conv(self, module: nn.Module) -> bool:
        """Return whether ``module`` is a container that begins with a convolution.

        Its result is a sparse tensor, and it cannot change its input.
        """
        if not self.is_container(module):
            return False
        first = next(iter(module._modules.values()), None)
        return first is not None and (
            self.is_conv_class(type(first)) or self.starts_with_conv(first)
        )


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of ``module`` before :func:`tritonspconv.optimize` changed it."""
    kind = type(module)
    # ``vars`` does not see inherited entries: a class derived from the changed one, as FSDP derives
    # one, counts as original.
    return vars(kind).get(ORIGINAL_CLASS, kind)


def family_of(module: nn.Module) -> LayerFamily | None:
    """Return the family of a convolution, or None if ``module`` is no convolution of a family."""
    find = getattr(type(module), "layer_family", None)
    return None if find is None else find(module)


def fuses_now(*, traced: bool = False) -> bool:
    """Return whether nothing watches or replaces the calls of all modules.

    Args:
        traced: True: the caller knows that ``torch.compile`` traces it.
    """
    return not (
        (torch.compiler.is_compiling() and not traced)
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        # torch.fx replaces the method while it traces.
        or nn.Module.__call__ is not _MODULE_CALL
        or torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_backward_pre_hooks
        or torch_module._global_backward_hooks
    )


def norm_numbers(norm: nn.BatchNorm1d | nn.SyncBatchNorm, channels: int) -> Norm | None:
    """Return the numbers of a batch norm's current computation, or None if torch must run it.

    Torch runs the norm in these cases: it is over another number of channels, which torch refuses;
    it has no running statistics; its tensors are not its own parameters and buffers; it is in
    evaluation mode while gradients are on. In training there are more cases: a cumulative average
    (``momentum=None``), several processes, and vectors that are not float32 or not contiguous.
    """
    if norm.num_features != channels:
        return None
    try:
        # Direct look-ups: attributes of a module are slow.
        mean, variance = norm._buffers["running_mean"], norm._buffers["running_var"]
        weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    except KeyError:
        return None
    if mean is None or variance is None:
        return None
    if not norm.training:
        if torch.is_grad_enabled():
            return None
        return ChannelNorm(mean, variance, weight, bias, norm.eps)
    momentum = norm.momentum
    if momentum is None or isinstance(norm, nn.SyncBatchNorm):
        return None
    for vector in (mean, variance, weight, bias):
        if vector is None:
            continue
        if vector.dtype is not torch.float32 or not vector.is_contiguous():
            return None
    count = norm._buffers.get("num_batches_tracked")
    return TrainingNorm(mean, variance, weight, bias, count, momentum, norm.eps)


def scale_and_shift(
    norm: nn.BatchNorm1d | nn.SyncBatchNorm, channels: int
) -> tuple[Tensor, Tensor] | None:
    """Return a batch norm as ``scale * x + shift``, in float32 or better.

    Returns:
        Two vectors ``[channels]``; None if the norm is in training mode or :func:`norm_numbers`
        leaves it to torch.
    """
    with torch.no_grad():
        numbers = None if norm.training else norm_numbers(norm, channels)
        if not isinstance(numbers, ChannelNorm):
            return None
        return numbers.scale_and_shift()


def owns_its_weight(module: nn.Module) -> bool:
    """Return whether the weight of ``module`` is a parameter that may be replaced.

    A parametrised weight (``torch.nn.utils.parametrizations``) is computed from other parameters at
    every access.
    """
    return not parametrize.is_parametrized(module)


def _torch_module(
    module: nn.Module, kinds: Mapping[type, tuple[Callable[..., Any], str | None]]
) -> nn.Module | None:
    """Return ``module``, or the module that it wraps, if its exact class is one of ``kinds``."""
    kind = type(module)
    known = kinds.get(kind)
    if known is None:
        return None
    forward, inner = known
    if forward is not kind.forward or kind.__call__ is not _MODULE_CALL or not is_unwatched(module):
        return None
    if inner is None:
        return module
    wrapped = module._modules.get(inner)
    return None if wrapped is None else _torch_module(wrapped, kinds)


def is_unwatched(module: nn.Module) -> bool:
    """Return whether calling the module runs its class's ``forward`` and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
        or "forward" in module.__dict__
    )
