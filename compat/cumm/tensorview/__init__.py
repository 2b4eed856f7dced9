"""``cumm.tensorview``, usually imported ``as tv``: arrays in, tensors with ``.numpy()`` out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from compat.cumm.tensorview import gemm

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Tensor", "from_numpy", "gemm"]


class Tensor(torch.Tensor):
    """A torch tensor with cumm's ``numpy_view``; what is made of it, or saved, is a plain one."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    def __reduce_ex__(self, proto: Any) -> Any:
        # torch.load reads plain tensors without being told to trust the file.
        return self.as_subclass(torch.Tensor).__reduce_ex__(proto)

    def numpy_view(self) -> np.ndarray:
        """Return an array over the same memory."""
        return self.numpy()


def from_numpy(array: np.ndarray) -> Tensor:
    """Return an array as a CPU tensor, whose ``.numpy()`` gives the array back.

    Shares memory with the array, save where torch cannot: read-only arrays and negative strides are
    copied.

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


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}: only from_numpy, Tensor and "
        "gemm.Activation are provided. The voxel generators take and return torch tensors."
    )
