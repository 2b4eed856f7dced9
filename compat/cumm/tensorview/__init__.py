"""``cumm.tensorview``, usually imported ``as tv``: arrays in, tensors with ``.numpy()`` out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from compat.cumm.tensorview import gemm

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "CUDAKernelTimer",
    "Tensor",
    "bfloat16",
    "bool_",
    "div_up",
    "float16",
    "float32",
    "float64",
    "from_numpy",
    "gemm",
    "int8",
    "int16",
    "int32",
    "int64",
    "tf32",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "unknown",
]

# Types of entries, by cumm's numbers.
unknown = -1
float32, int32, int16, int8, float64, bool_, uint8, float16, int64, uint16, uint32, uint64 = range(
    12
)
bfloat16, tf32 = 12, 13

_TORCH_DTYPES = {
    float32: torch.float32,
    int32: torch.int32,
    int16: torch.int16,
    int8: torch.int8,
    float64: torch.float64,
    bool_: torch.bool,
    uint8: torch.uint8,
    float16: torch.float16,
    int64: torch.int64,
    uint16: torch.uint16,
    uint32: torch.uint32,
    uint64: torch.uint64,
    bfloat16: torch.bfloat16,
    tf32: torch.float32,
}


def torch_dtype(dtype: int) -> torch.dtype:
    """Return torch's name of one of the types above.

    Raises:
        ValueError: It has none.
    """
    if dtype not in _TORCH_DTYPES:
        known = sorted(_TORCH_DTYPES)
        raise ValueError(f"dtype must be a type of cumm.tensorview, one of {known}; got {dtype}.")
    return _TORCH_DTYPES[dtype]


class Tensor(torch.Tensor):
    """A torch tensor with cumm's ``numpy_view``. Results and saved copies are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    def __reduce_ex__(self, proto: Any) -> Any:
        # torch.load reads plain tensors also with ``weights_only=True``.
        return self.as_subclass(torch.Tensor).__reduce_ex__(proto)

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """Return an array with a copy of the values.

        Args:
            force: The argument of :meth:`torch.Tensor.numpy`.
        """
        return self.as_subclass(torch.Tensor).numpy(force=force).copy()

    def numpy_view(self) -> np.ndarray:
        """Return an array over the same memory."""
        return self.as_subclass(torch.Tensor).numpy()


class CUDAKernelTimer:
    """Takes no times; use ``torch.profiler``.

    Args:
        enable: Kept as an attribute.
    """

    def __init__(self, enable: bool) -> None:
        self.enable = enable

    def push(self, name: str) -> None:
        """Do nothing."""

    def pop(self) -> None:
        """Do nothing."""

    def record(self, name: str, stream: int = 0, event_id: int = 0) -> str:
        """Do nothing; return ``name``."""
        return name

    def insert_pair(self, name: str, start: str, stop: str) -> None:
        """Do nothing."""

    def has_pair(self, name: str) -> bool:
        """Return False."""
        return False

    def sync_all_event(self) -> None:
        """Do nothing."""

    def get_all_pair_duration(self) -> dict[str, float]:
        """Return no times."""
        return {}

    def get_pair_duration(self, name: str) -> float:
        """Return 0.0."""
        return 0.0


def from_numpy(array: np.ndarray) -> Tensor:
    """Return an array as a CPU tensor, whose ``.numpy_view()`` gives the array back.

    The tensor shares memory with the array. Read-only arrays and negative strides are copied,
    because torch cannot share them.

    Args:
        array: Any shape and number type.

    Raises:
        TypeError: It is not an array.
    """
    if not hasattr(array, "flags"):
        raise TypeError(
            f"from_numpy: array must be a numpy.ndarray; got {type(array).__name__}. Use "
            "numpy.asarray first."
        )
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = array.copy()
    return torch.from_numpy(array).as_subclass(Tensor)


def div_up(a: int, b: int) -> int:
    """Return ``a / b``, rounded up."""
    return -(-a // b)


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}: not provided. Only from_numpy, Tensor, "
        "gemm.Activation, CUDAKernelTimer, div_up and the types of entries are. The voxel "
        "generators take and return torch tensors."
    )
