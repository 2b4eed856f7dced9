"""``SparseConvTensor``, and helpers that spconv defines beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compat.spconv import constants
from compat.spconv._names import module_getattr
from compat.spconv.core import ConvAlgo
from compat.spconv.pytorch._errors import SpconvError, rows_differ
from compat.spconv.pytorch._numbers import per_axis, whole_number, whole_numbers
from compat.spconv.pytorch._records import ImplicitGemmIndiceData, IndiceData
from compat.spconv.pytorch._sites import IndiceDict, LocatedSites
from compat.spconv.tools import CUDAKernelTimer
from tritonspconv import ops
from tritonspconv.coords import ActiveSites
from tritonspconv.coords.row_tensor import reads_values
from tritonspconv.debug import checks_coords
from tritonspconv.graph_capture import is_traced, refuse_capture
from tritonspconv.guide import more

__all__ = [
    "ConvAlgo",
    "ImplicitGemmIndiceData",
    "IndiceData",
    "SpConvTensorMeta",
    "SparseConvTensor",
    "expand_nd",
    "scatter_nd",
]

_NO_GRID = torch.Tensor()

__getattr__ = module_getattr(
    __name__,
    elsewhere={
        "compat.spconv.constants": "SPCONV_FX_TRACE_MODE",
        "compat.spconv.pytorch.constants": "PYTORCH_VERSION",
        "torch.fx": "ProxyableClassMeta",
    },
    refused={
        "ThrustSortAllocator": "It holds memory for spconv's C++; torch's allocator does that here."
    },
)


def expand_nd(ndim: int, val: Any) -> list[int]:
    """Return ``val`` as ``ndim`` ints: one int for every axis, or a sequence of ``ndim`` of them.

    Raises:
        SpconvError: A sequence of another length, or a number that is not whole.
    """
    return per_axis("val", ndim, val)


def scatter_nd(indices: Tensor, updates: Tensor, shape: Sequence[int]) -> Tensor:
    """Write ``updates`` into zeros of ``shape`` at ``indices``.

    Args:
        indices: Integers ``[*M, K]``; the last axis indexes the first K axes of the result.
        updates: Values ``[*M, *shape[K:]]``.
        shape: Shape of the result.

    Returns:
        A tensor of ``shape``. If an index repeats, the last value stays; nothing is added up.
    """
    depth = indices.shape[-1]
    out = updates.new_zeros(tuple(shape))
    where = tuple(indices.reshape(-1, depth).long().unbind(1))
    out[where] = updates.reshape(-1, *shape[depth:])
    return out


class SpConvTensorMeta(torch.fx.ProxyableClassMeta):  # pyright: ignore[reportPrivateImportUsage]
    """Lets torch.fx record constructions from proxies, and has no effect otherwise."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a new object, or a proxy of one while torch.fx traces."""
        if any(isinstance(arg, torch.fx.Proxy) for arg in (*args, *kwargs.values())):
            return super().__call__(*args, **kwargs)
        return type.__call__(cls, *args, **kwargs)


class SparseConvTensor(metaclass=SpConvTensorMeta):
    """Features at the active sites of a bounded grid.

    Rows outside ``spatial_shape`` or ``batch_size`` change results without an error, since a search
    for them would wait for the device. ``x.validate_coords()`` searches once. The debug mode
    :func:`tritonspconv.debug.check_coords` searches in every new tensor.

    Every attribute may be assigned, ``_features`` included; ``features`` itself is read-only.

    Args:
        features: ``[N, C]``.
        indices: int32 ``[N, 1 + ndim]``: batch index, then coordinates in ``spatial_shape`` order.
        spatial_shape: Extents of the grid, one per axis.
        batch_size: Number of samples.
        grid, voxel_num, benchmark, permanent_thrust_allocator, enable_timer: Kept, without effect.
        indice_dict: Recorded kernel maps by ``indice_key``; shared, not copied.
        force_algo: Label that replaces the labels of all layers.

    Raises:
        TypeError: Features or indices are no tensors.
        SpconvError: Wrong rank, dtype or length; numbers of rows differ; ``spatial_shape`` or
            ``batch_size`` are not whole.
        ValueError: In the debug mode, a row lies outside the grid or the batch.
    """

    def __init__(
        self,
        features: Tensor,
        indices: Tensor,
        spatial_shape: Sequence[int] | Any,
        batch_size: int,
        grid: Tensor | None = None,
        voxel_num: Tensor | None = None,
        indice_dict: dict[Any, Any] | None = None,
        benchmark: bool = False,
        permanent_thrust_allocator: bool = False,
        enable_timer: bool = False,
        force_algo: ConvAlgo | None = None,
    ) -> None:
        refuse_capture("SparseConvTensor")
        if not constants.SPCONV_FX_TRACE_MODE:
            _check_parts(features, indices, spatial_shape, batch_size)
            spatial_shape = whole_numbers("SparseConvTensor: spatial_shape", spatial_shape)
            if type(batch_size) is not int:
                batch_size = whole_number("SparseConvTensor: batch_size", batch_size)
        self._features = features
        self.indices = indices
        self.spatial_shape = [*map(int, spatial_shape)]
        self.batch_size = batch_size
        self.indice_dict = IndiceDict() if indice_dict is None else indice_dict
        self.grid: Tensor | None = _NO_GRID if grid is None else grid
        self.voxel_num = voxel_num
        self.benchmark = benchmark
        self.benchmark_record: dict[str, Any] = {}
        self.thrust_allocator = None
        self._timer = CUDAKernelTimer(enable_timer)
        self.force_algo = force_algo
        self.int8_scale = None
        if checks_coords() and not constants.SPCONV_FX_TRACE_MODE:
            self._locate().sites.validate_bounds()

    def __repr__(self) -> str:
        return f"SparseConvTensor[shape={self._features.shape}]"

    @property
    def features(self) -> Tensor:
        """Features ``[N, C]``; read-only, see :meth:`replace_feature`."""
        return self._features

    @features.setter
    def features(self, value: Tensor) -> None:
        raise SpconvError(
            "features is read-only, because layers share it. Write "
            "'x = x.replace_feature(new_features)' instead of 'x.features = new_features'."
        )

    @property
    def spatial_size(self) -> int:
        """Number of cells of one sample."""
        size = 1
        for extent in self.spatial_shape:
            size *= extent
        return size

    @property
    def is_quantized(self) -> bool:
        """True if the features have a quantised dtype."""
        return self.features.is_quantized

    @property
    def _sites(self) -> ActiveSites:
        """The engine's view of ``indices``."""
        return self._locate().sites

    def _locate(self) -> LocatedSites:
        """Return the sites of ``indices``, which ``indice_dict`` keeps."""
        keeper = self.indice_dict
        if not isinstance(keeper, IndiceDict):
            keeper = IndiceDict(keeper)
        return keeper.locate(self.indices, self.spatial_shape, self.batch_size)

    def _derive(
        self,
        features: Tensor,
        indice_dict: dict[Any, Any] | None = None,
        located: LocatedSites | None = None,
    ) -> SparseConvTensor:
        """Return a copy with other features and, where given, another dict and other sites."""
        out = object.__new__(SparseConvTensor)
        if is_traced():
            # torch.compile of torch 2.11 does not know how to update an object's dict.
            for name in _FIELDS:
                setattr(out, name, getattr(self, name))
            out._features, out.spatial_shape = features, list(self.spatial_shape)
            out.indice_dict = self.indice_dict if indice_dict is None else indice_dict
            if located is not None:
                out.indices = located.indices
                out.spatial_shape = list(located.spatial_shape)
                out.indice_dict.located = located  # pyright: ignore[reportAttributeAccessIssue]
            return out
        fields: dict[str, Any] = vars(out)
        fields.update(vars(self))
        if len(fields) != len(_FIELDS):
            # Attributes that a user attached stay with their tensor, as in spconv.
            for name in fields.keys() - _FIELDS:
                del fields[name]
        fields["_features"] = features
        if indice_dict is not None:
            fields["indice_dict"] = indice_dict
        if located is None:
            fields["spatial_shape"] = list(self.spatial_shape)
        else:
            fields["indices"] = located.indices
            fields["spatial_shape"] = list(located.spatial_shape)
            if isinstance(indice_dict, IndiceDict):
                indice_dict.located = located
        return out

    def _successor(
        self,
        features: Tensor,
        indice_dict: dict[Any, Any] | None = None,
        located: LocatedSites | None = None,
    ) -> SparseConvTensor:
        """Return a layer's output for this tensor; the arguments are those of :meth:`_derive`.

        If users replaced ``shadow_copy`` or ``replace_feature``, in a subclass or by assignment,
        these methods make the result, as in spconv.
        """
        if (
            type(self).shadow_copy is _SHADOW_COPY
            and SparseConvTensor.replace_feature is _REPLACE_FEATURE
            and "shadow_copy" not in self.__dict__
        ):
            return self._derive(features, indice_dict, located)
        out = self.shadow_copy().replace_feature(features)
        if located is not None:
            out.indices = located.indices
            out.spatial_shape = list(located.spatial_shape)
        if indice_dict is not None:
            out.indice_dict = indice_dict
            if isinstance(indice_dict, IndiceDict):
                indice_dict.located = self._locate() if located is None else located
        return out

    def _row_tensors(self) -> tuple[Tensor, Tensor]:
        """Return features and indices; see :class:`tritonspconv.has_rows.HasRows`."""
        return self.features, self.indices

    def _grid_of_rows(self) -> str:
        """Return the grid, which is the same at every call of a captured function."""
        return f"spatial_shape {list(self.spatial_shape)}, batch_size {self.batch_size}"

    def _with_row_tensors(self, feats: Tensor, coords: Tensor) -> SparseConvTensor:
        """Return other rows in the same grid, without recorded kernel maps."""
        out = self._derive(feats, IndiceDict())
        out.indices = coords
        return out

    def _rows_in_cells(self) -> tuple[Tensor, ActiveSites]:
        """Return features and sites."""
        return self.features, self._sites

    # Indices count cells.
    _with_rows_in_cells = _with_row_tensors

    def validate_coords(self) -> None:
        """Check that every row lies in the grid and no site repeats.

        This call waits for the device.

        Raises:
            ValueError: A row is out of range or repeats another.
        """
        self._sites.validate()

    def replace_feature(self, feature: Tensor) -> SparseConvTensor:
        """Return the same sites with other features; shares ``indices`` and ``indice_dict``.

        The number of rows is not checked: code that changes it assigns ``indices`` afterwards.
        """
        if feature.ndim != 2:
            raise SpconvError(
                f"replace_feature: expected features [N, C]; got shape {tuple(feature.shape)}. "
                "Reshape them to two axes."
            )
        return self._derive(feature)

    def select_by_index(self, valid_indices: Tensor) -> SparseConvTensor:
        """Return the rows that ``valid_indices``, row numbers or a bool mask, selects.

        The result starts with an empty ``indice_dict``: recorded maps belong to the full rows.
        """
        out = self._derive(self.features[valid_indices], IndiceDict())
        out.indices = self.indices[valid_indices]
        return out

    def minus(self) -> SparseConvTensor:
        """Return the tensor with negated features."""
        return self.replace_feature(-self.features)

    def shadow_copy(self) -> SparseConvTensor:
        """Return another object around the same features, indices and ``indice_dict``."""
        return self._derive(self.features)

    def dequantize(self) -> SparseConvTensor:
        """Return the tensor with real-valued features."""
        feats = self.features
        return self.replace_feature(feats.dequantize() if self.is_quantized else feats)

    def q_scale(self) -> float:
        """Return the scale of quantised features.

        Raises:
            SpconvError: The features are not quantised.
        """
        if not self.is_quantized:
            raise SpconvError(f"q_scale needs quantised features; got {self.features.dtype}.")
        return self.features.q_scale()

    def find_indice_pair(self, key: Any) -> IndiceData | ImplicitGemmIndiceData | None:
        """Return the entry that a layer recorded under ``key``, or None."""
        return None if key is None else self.indice_dict.get(key)

    @classmethod
    def from_dense(cls, x: Tensor) -> SparseConvTensor:
        """Return the sites of a dense ``[B, *spatial, C]`` where any channel is not zero.

        Rows ascend by batch index and coordinates. Differentiable.
        """
        rows = (x != 0).any(dim=-1).nonzero()
        indices = rows.int()
        return cls(x[tuple(rows.unbind(1))], indices, x.shape[1:-1], x.shape[0])

    def dense(self, channels_first: bool = True) -> Tensor:
        """Return the whole grid, with zeros at inactive sites.

        Args:
            channels_first: True: ``[B, C, *spatial]``. False: ``[B, *spatial, C]``.

        Raises:
            IndexError: On a CPU: a row lies outside the grid or the batch. A GPU leaves such rows
                out, since a search for them would wait for the device.
        """
        feats = self.features
        if feats.shape[0] != self.indices.shape[0]:
            raise rows_differ("dense()", feats.shape[0], self.indices.shape[0])
        if feats.device.type == "cpu" and reads_values(feats):
            _check_dense_rows(self._sites)
        return ops.to_dense(feats, self._sites, channels_first=channels_first)

    def __add__(self, other: SparseConvTensor | Tensor) -> SparseConvTensor:
        """Add features row by row; the coordinates are not compared."""
        if isinstance(other, SparseConvTensor):
            other = other.features
        elif not isinstance(other, Tensor):
            raise SpconvError(
                f"SparseConvTensor + {type(other).__name__}: expected a SparseConvTensor or a "
                "Tensor. Use x.replace_feature(x.features + value)."
            )
        return self.replace_feature(self.features + other)

    __radd__ = __add__
    __iadd__ = __add__


# The attributes that ``SparseConvTensor.__init__`` sets.
_FIELDS = frozenset(
    (
        "_features", "indices", "spatial_shape", "batch_size", "indice_dict", "grid", "voxel_num",
        "benchmark", "benchmark_record", "thrust_allocator", "_timer", "force_algo", "int8_scale",
    )
)  # fmt: skip
# The adapter's own versions of the methods that make the output of spconv's layers.
_SHADOW_COPY, _REPLACE_FEATURE = SparseConvTensor.shadow_copy, SparseConvTensor.replace_feature


def _check_dense_rows(sites: ActiveSites) -> None:
    try:
        sites.validate_bounds()
    except ValueError as error:
        raise IndexError(f"dense(): {error}") from error


def _check_parts(features: Tensor, indices: Tensor, spatial_shape: Any, batch_size: Any) -> None:
    """Check types, ranks, lengths and dtypes; reads metadata only."""
    for name, part in (("features", features), ("indices", indices)):
        if not isinstance(part, Tensor):
            raise TypeError(
                f"SparseConvTensor: {name} must be a torch.Tensor; got {type(part).__name__}. Use "
                "torch.as_tensor."
            )
    if features.ndim != 2 or indices.ndim != 2:
        raise SpconvError(
            "SparseConvTensor: expected features [N, C] and indices [N, 1 + ndim]; got shapes "
            f"{tuple(features.shape)} and {tuple(indices.shape)}."
        )
    if features.shape[0] != indices.shape[0]:
        raise SpconvError(
            "SparseConvTensor: features and indices must have one row per site each; got shapes "
            f"{tuple(features.shape)} and {tuple(indices.shape)}."
        )
    if indices.dtype != torch.int32:
        raise SpconvError(
            f"SparseConvTensor: indices must be int32; got {indices.dtype}. Pass indices.int()."
            + more("int32-coords")
        )
    ndim = indices.shape[1] - 1
    if not hasattr(spatial_shape, "__len__") or len(spatial_shape) != ndim:
        shown = list(spatial_shape) if hasattr(spatial_shape, "__len__") else spatial_shape
        raise SpconvError(
            f"SparseConvTensor: spatial_shape must have {ndim} extents for indices "
            f"{tuple(indices.shape)} (batch index first); got {shown}."
        )
    if not isinstance(batch_size, Tensor) and not _is_positive(batch_size):
        raise SpconvError(
            f"SparseConvTensor: batch_size must be positive; got {batch_size!r}. Pass the number "
            "of samples."
        )


def _is_positive(value: Any) -> bool:
    try:
        return value > 0
    except TypeError:
        return False
