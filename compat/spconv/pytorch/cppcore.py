"""``spconv.pytorch.cppcore``: tensors as ``cumm`` sees them, streams and devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from compat.cumm import tensorview as tv
from compat.spconv._names import module_getattr

__all__ = ["get_arch", "get_current_stream", "torch_tensor_to_tv", "torch_tensors_to_tv"]

_TORCH_DTYPE_TO_TV = {
    torch.float32: tv.float32,
    torch.float64: tv.float64,
    torch.float16: tv.float16,
    torch.bfloat16: tv.bfloat16,
    torch.int32: tv.int32,
    torch.int64: tv.int64,
    torch.int8: tv.int8,
    torch.int16: tv.int16,
    torch.uint8: tv.uint8,
    torch.qint8: tv.int8,
}

__getattr__ = module_getattr(
    __name__,
    modules={"tv": "compat.cumm.tensorview"},
    elsewhere={
        "compat.spconv.constants": "AllocKeys",
        "compat.spconv.cppconstants": "COMPILED_CUDA_ARCHS",
    },
    refused={
        "TorchAllocator ExternalAllocator": (
            "It hands memory to spconv's C++, which does not exist here; use torch.empty."
        ),
        "TorchSpconvMatmul ExternalSpconvMatmul": (
            "It multiplies for spconv's C++, which does not exist here; use torch.mm."
        ),
        "CompileInfo": "Nothing was compiled beforehand.",
    },
)


def torch_tensor_to_tv(
    ten: torch.Tensor,
    dtype: int | None = None,
    shape: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
) -> tv.Tensor:
    """Return a view of a tensor's memory as ``cumm.tensorview`` has it.

    Args:
        ten: The tensor, on any device.
        dtype: Read the memory as this type of ``cumm.tensorview``. Default: the tensor's.
        shape: Read the memory in this shape. Default: the tensor's.
        stride: Strides in entries, with ``shape``. Default: the strides of a dense array, or the
            tensor's own strides if it is not contiguous.
    """
    seen = ten.detach()
    if dtype is not None and dtype != _TORCH_DTYPE_TO_TV.get(seen.dtype):
        seen = seen.view(tv.torch_dtype(dtype))
    if shape is not None and stride is None:
        seen = seen.view(tuple(shape))
    elif stride is not None:
        seen = seen.as_strided(tuple(seen.shape if shape is None else shape), tuple(stride))
    return seen.as_subclass(tv.Tensor)


def torch_tensors_to_tv(*tens: torch.Tensor) -> Iterator[tv.Tensor]:
    """Yield :func:`torch_tensor_to_tv` of each tensor."""
    return (torch_tensor_to_tv(ten) for ten in tens)


def get_current_stream() -> int:
    """Return the address of the current CUDA stream; 0 where there is no GPU."""
    return torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0


def get_arch() -> tuple[int, int]:
    """Return the compute capability of the current GPU, such as (9, 0).

    Raises:
        RuntimeError: There is no GPU (torch's message).
    """
    return torch.cuda.get_device_capability()
