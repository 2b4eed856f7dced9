"""``MinkowskiEngine.MinkowskiOps``: features of several tensors, and dense tensors to sparse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._features import AnyTensor, features_of, with_features
from compat.minkowski._names import module_getattr
from compat.minkowski._traced import derive, have_one_map
from compat.minkowski.MinkowskiCommon import MinkowskiModuleBase
from compat.minkowski.MinkowskiSparseTensor import SparseTensor
from compat.minkowski.MinkowskiTensorField import TensorField
from tritonspconv.graph_capture import is_traced, run_untraced
from tritonspconv.guide import more


class MinkowskiLinear(nn.Module):
    """:class:`torch.nn.Linear`, the attribute ``linear``, on the features of every row.

    Args:
        in_features: Channels of the input.
        out_features: Channels of the output.
        bias: Add a learnt bias.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)

    def forward(self, input: AnyTensor) -> AnyTensor:
        """Map the features of a sparse tensor or field."""
        return with_features(input, self.linear(features_of(input)))

    def __repr__(self) -> str:
        linear = self.linear
        return (
            f"{type(self).__name__}(in_features={linear.in_features}, "
            f"out_features={linear.out_features}, bias={linear.bias is not None})"
        )


def cat(*sparse_tensors: Any) -> Any:
    """Concatenate the channels of tensors on the same coordinates.

    Args:
        sparse_tensors: Two or more sparse tensors, two or more fields, or one list of either. They
            share a coordinate manager and a key, or their keys have equal rows. ``+`` and
            ``MinkowskiUnion`` combine different coordinates.

    Returns:
        A tensor of the same kind on the key of the first.

    Raises:
        AssertionError: There are fewer than two, or they differ in kind, device, manager or key.
        ValueError: They are neither sparse tensors nor fields.
    """
    return _combine("cat", sparse_tensors, lambda feats: torch.cat(feats, dim=-1))


def _sum(*sparse_tensors: Any) -> Any:
    """Add the features of tensors on the same coordinates; ``MinkowskiEngine.sum``. See `cat`."""
    return _combine("sum", sparse_tensors, _total)


def mean(*sparse_tensors: Any) -> Any:
    """Average the features of tensors on the same coordinates. See :func:`cat`."""
    return _combine("mean", sparse_tensors, _mean)


def var(*sparse_tensors: Any) -> Any:
    """Return the biased variance over tensors on the same coordinates. See :func:`cat`."""
    return _combine("var", sparse_tensors, _variance)


def _total(feats: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, feats)


def _mean(feats: Sequence[Tensor]) -> Tensor:
    return _total(feats) / len(feats)


def _variance(feats: Sequence[Tensor]) -> Tensor:
    average = _mean(feats)
    return _mean([(each - average).square() for each in feats])


def _combine(
    name: str, arguments: tuple[Any, ...], operator: Callable[[list[Tensor]], Tensor]
) -> Any:
    """Apply ``operator`` to the features of tensors on the same coordinates."""
    tensors = _listed(name, arguments)
    if is_traced():
        if all(have_one_map(tensors[0], tensor, SparseTensor) for tensor in tensors):
            return derive(tensors[0], operator([tensor._F for tensor in tensors]))
        return run_untraced(_combine, name, arguments, operator)
    first = tensors[0]
    if isinstance(first, SparseTensor):
        kind, key_name = SparseTensor, "coordinate_map_key"
    elif isinstance(first, TensorField):
        kind, key_name = TensorField, "coordinate_field_map_key"
    else:
        raise MinkowskiError(
            f"{name}: inputs must be sparse tensors or fields; got {type(first).__name__}."
        )
    key = getattr(first, key_name)
    for tensor in tensors:
        if not isinstance(tensor, kind):
            raise MinkowskiError(
                f"{name}: inputs must all be of one kind; got {kind.__name__} and "
                f"{type(tensor).__name__}."
            )
        if tensor.device != first.device:
            raise MinkowskiError(
                f"{name}: inputs must share a device; got {first.device} and {tensor.device}."
            )
        if tensor.coordinate_manager is not first.coordinate_manager:
            raise MinkowskiError(
                f"{name}: inputs must share a coordinate manager. Build the second tensor with "
                "coordinate_manager=first.coordinate_manager." + more("same-sites")
            )
        if not first._has_rows_of(tensor):
            raise MinkowskiError(
                f"{name}: inputs must share their coordinates; got keys {key} and "
                f"{getattr(tensor, key_name)}. Use + or MinkowskiUnion for different coordinates."
                + more("same-sites")
            )
    features = operator([tensor.F for tensor in tensors])
    return kind(features, **{key_name: key, "coordinate_manager": first.coordinate_manager})


def _listed(name: str, arguments: tuple[Any, ...]) -> Sequence[Any]:
    tensors = arguments[0] if len(arguments) == 1 else arguments
    if not isinstance(tensors, (tuple, list)) or len(tensors) < 2:
        got = len(tensors) if isinstance(tensors, (tuple, list)) else type(tensors).__name__
        raise MinkowskiError(
            f"{name}: two or more tensors must be given, one by one or as a list; got {got}."
        )
    return tensors


def dense_coordinates(shape: Sequence[int]) -> Tensor:
    """List the coordinates of every cell of a dense tensor, last axis fastest.

    Args:
        shape: Its shape, (B, C, *spatial axes).

    Returns:
        int32 [B * cells, 1 + D] on the CPU.

    Raises:
        AssertionError: There is no spatial axis.
    """
    if len(shape) < 3:
        raise MinkowskiError(
            f"dense_coordinates: shape must be (B, C, *spatial axes); got {tuple(shape)}."
        )
    axes = [
        torch.arange(extent, dtype=torch.int32, device="cpu") for extent in (shape[0], *shape[2:])
    ]
    return torch.cartesian_prod(*axes)


def to_sparse(
    x: Tensor,
    format: str | None = None,
    coordinates: Any = None,
    device: torch.device | str | None = None,
) -> SparseTensor:
    """Make a sparse tensor of a dense tensor's cells, without cells that are zero in every channel.

    Differentiable in ``x``. Rows are in the order of the cells, last axis fastest.

    Args:
        x: Dense tensor; the batch axis comes first.
        format: A letter for each axis: ``B`` first, one ``C``, ``X`` for spatial axes. Default:
            ``"BCX...X"``.
        coordinates: Ignored, as in the original.
        device: Device of the result. Default: the device of ``x``.

    Raises:
        AssertionError: ``x`` has no spatial axis, or ``format`` is of another form.
    """
    if x.ndim < 3:
        raise MinkowskiError(f"to_sparse: x must have 3 axes or more; got {list(x.shape)}.")
    format = "BC" + "X" * (x.ndim - 2) if format is None else format
    if format[:1] != "B" or sorted(format[1:]) != sorted("C" + "X" * (x.ndim - 2)):
        raise MinkowskiError(
            f"to_sparse: format must have {x.ndim} letters, B first, one C, else X; got {format!r}."
        )
    cells = x.movedim(format.index("C"), -1)
    occupied = cells.detach().abs().sum(-1) != 0
    return SparseTensor(cells[occupied], occupied.nonzero().int(), device=device or x.device)


def to_sparse_all(dense_tensor: Tensor, coordinates: Tensor | None = None) -> SparseTensor:
    """Make a sparse tensor of all cells of a dense one. Differentiable in ``dense_tensor``.

    Args:
        dense_tensor: Dense tensor (B, C, *spatial axes).
        coordinates: The result of :func:`dense_coordinates` for this shape, if you have it already.

    Raises:
        AssertionError: There is no spatial axis.
    """
    if coordinates is None:
        coordinates = dense_coordinates(dense_tensor.shape)
    cells = dense_tensor.movedim(1, -1)
    return SparseTensor(
        cells.reshape(-1, dense_tensor.shape[1]), coordinates, device=dense_tensor.device
    )


class MinkowskiToSparseTensor(MinkowskiModuleBase):
    """Makes a sparse tensor of a field, or of a dense tensor (B, C, *spatial axes).

    Args:
        remove_zeros: Leave out cells of a dense tensor that are zero in every channel.
        coordinates: With ``remove_zeros=False``, the coordinates of all cells; see
            :func:`to_sparse_all`.

    Raises:
        AssertionError: ``coordinates`` are given and zeros are to be removed.
    """

    def __init__(self, remove_zeros: bool = True, coordinates: Tensor | None = None) -> None:
        super().__init__()
        if remove_zeros and coordinates is not None:
            raise MinkowskiError(
                "MinkowskiToSparseTensor: coordinates need remove_zeros=False; got True."
            )
        self.remove_zeros = remove_zeros
        self.coordinates = coordinates

    def forward(self, input: TensorField | Tensor) -> SparseTensor:
        """Convert.

        Raises:
            ValueError: ``input`` is neither a field nor a tensor.
        """
        if isinstance(input, TensorField):
            return input.sparse()
        if not isinstance(input, Tensor):
            raise MinkowskiError(
                "MinkowskiToSparseTensor: input must be a TensorField or a torch.Tensor; got "
                f"{type(input).__name__}."
            )
        return to_sparse(input) if self.remove_zeros else to_sparse_all(input, self.coordinates)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class MinkowskiToDenseTensor(MinkowskiModuleBase):
    """Makes a dense tensor (B, C, *spatial axes); see ``SparseTensor.dense``.

    Args:
        shape: Shape of the result, all axes. Default: the shape of the coordinates.
    """

    def __init__(self, shape: torch.Size | None = None) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, input: SparseTensor) -> Tensor:
        """Convert."""
        return input.dense(shape=self.shape)[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class MinkowskiToFeature(MinkowskiModuleBase):
    """Returns the features of a sparse tensor or field, e.g. before layers of torch."""

    def forward(self, x: SparseTensor | TensorField) -> Tensor:
        """Return the features.

        Raises:
            AssertionError: ``x`` is neither a sparse tensor nor a field.
        """
        if not isinstance(x, (SparseTensor, TensorField)):
            raise MinkowskiError(
                "MinkowskiToFeature: the input must be a SparseTensor or TensorField; got "
                f"{type(x).__name__}."
            )
        return x.F


class MinkowskiStackCat(nn.Sequential):
    """Runs every module on the same input and concatenates the outputs with :func:`cat`."""

    def forward(self, x: Any) -> Any:
        """Run the modules."""
        return cat([module(x) for module in self])


class MinkowskiStackSum(nn.Sequential):
    """Runs every module on the same input and adds the outputs."""

    def forward(self, x: Any) -> Any:
        """Run the modules."""
        return _sum([module(x) for module in self])


class MinkowskiStackMean(nn.Sequential):
    """Runs every module on the same input and averages the outputs."""

    def forward(self, x: Any) -> Any:
        """Run the modules."""
        return mean([module(x) for module in self])


class MinkowskiStackVar(nn.Sequential):
    """Runs every module on the same input and returns the biased variance of the outputs."""

    def forward(self, x: Any) -> Any:
        """Run the modules."""
        return var([module(x) for module in self])


__getattr__ = module_getattr(__name__)
