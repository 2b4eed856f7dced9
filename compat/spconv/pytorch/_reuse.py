"""Checks before a layer uses the kernel map that another layer recorded under its key.

A layer that Python runs raises the error of a check. A layer that ``torch.compile`` traces asks for
the first difference alone, and leaves the error to Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from compat.spconv.core import ConvAlgo
from compat.spconv.pytorch._errors import SpconvError
from tritonspconv.guide import more

if TYPE_CHECKING:
    from compat.spconv.pytorch.core import SparseConvTensor


class KeyedLayer(Protocol):
    """The attributes of a layer that its checks read."""

    kernel_size: list[int]
    dilation: list[int]
    indice_key: Any
    algo: ConvAlgo


class Difference(NamedTuple):
    """A setting in which a layer differs from the layer that recorded a map.

    Attributes:
        name: Name of the setting.
        expected: Its value when the map was recorded.
        got: Its value now.
    """

    name: str
    expected: Any
    got: Any


def algo_of(layer: KeyedLayer, input: SparseConvTensor) -> ConvAlgo:
    """Return the label of a layer; the layers of one key have the same."""
    return layer.algo if input.force_algo is None else input.force_algo


def submanifold_difference(
    layer: KeyedLayer, input: SparseConvTensor, record: Any
) -> Difference | None:
    """Return why a submanifold layer may not use a submanifold map, or None if it may.

    Coordinates are not compared, as in spconv. Downstream code assigns tuples where spconv has
    lists.
    """
    made, got = record.ksize, layer.kernel_size
    if made != got and list(made) != list(got):
        return Difference("kernel_size", made, got)
    made, got = record.dilation, layer.dilation
    if made != got and list(made) != list(got):
        return Difference("dilation", made, got)
    made, got = record.spatial_shape, input.spatial_shape
    if made != got and list(made) != list(got):
        return Difference("spatial_shape", made, got)
    made, got = record.indices.shape[0], input.indices.shape[0]
    return None if made == got else Difference("number of rows", made, got)


def inverse_difference(
    layer: KeyedLayer, input: SparseConvTensor, record: Any
) -> Difference | None:
    """Return why an inverse layer may not read a strided map backwards, or None if it may."""
    made, got = record.ksize, layer.kernel_size
    if made != got and list(made) != list(got):
        return Difference("kernel_size", made, got)
    made, got = record.out_spatial_shape, input.spatial_shape
    if made != got and list(made) != list(got):
        return Difference("spatial_shape", made, got)
    made, got = record.out_indices.shape[0], input.indices.shape[0]
    return None if made == got else Difference("number of rows", made, got)


def refuse_algo(layer: KeyedLayer, input: SparseConvTensor, record: Any) -> NoReturn:
    """Raise the error of a layer with another label than the layer that recorded the key.

    Raises:
        SpconvError: Always.
    """
    _refuse("layer", layer, Difference("algo", record.algo, algo_of(layer, input)))


def check_submanifold_reuse(layer: KeyedLayer, input: SparseConvTensor, record: Any) -> None:
    """Do spconv's checks before a submanifold layer uses a recorded map.

    Raises:
        SpconvError: The layer that made ``record`` has another window or saw another tensor.
    """
    if not record.is_subm:
        raise SpconvError(
            f"indice_key {layer.indice_key!r} belongs to a layer that is not submanifold: only "
            "submanifold layers may share a key. Give this layer a key of its own."
            + more("indice-key")
        )
    difference = submanifold_difference(layer, input, record)
    if difference is not None:
        _refuse("submanifold layer", layer, difference)


def check_inverse_reuse(layer: KeyedLayer, input: SparseConvTensor, record: Any) -> None:
    """Do spconv's checks before an inverse layer reads a map backwards.

    Raises:
        SpconvError: The layer that made ``record`` has another window, or its output is not
            ``input``.
    """
    difference = inverse_difference(layer, input, record)
    if difference is not None:
        _refuse("inverse convolution", layer, difference)


def _refuse(what: str, layer: KeyedLayer, difference: Difference) -> NoReturn:
    name, expected, got = difference
    raise SpconvError(
        f"this {what} shares indice_key {layer.indice_key!r} with a layer of another {name}: "
        f"expected {expected}, got {got}. Make them equal, or use another key." + more("indice-key")
    )
