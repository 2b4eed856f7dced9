"""A map from integers to numbers, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from compat.spconv._names import module_getattr
from compat.spconv.pytorch._errors import SpconvError

__all__ = ["HashTable"]

__getattr__ = module_getattr(
    __name__,
    modules={"tv": "compat.cumm.tensorview"},
    elsewhere={"compat.spconv.pytorch.cppcore": "get_current_stream torch_tensor_to_tv"},
    refused={"main": "A trial of spconv's own."},
)

_KEY_DTYPES = (torch.int32, torch.int64)
_VALUE_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)


class HashTable:
    """Keys with one value each; sorted inside, so that every result is deterministic.

    Args:
        device: Device of keys and values.
        key_dtype: int32 or int64.
        value_dtype: int32, int64, float32 or float64.
        max_size: Accepted; the table grows as needed.

    Attributes:
        keys_data: The keys, ascending.
        values_data: Their values.

    Insertion waits for the device.
    """

    def __init__(
        self,
        device: torch.device,
        key_dtype: torch.dtype,
        value_dtype: torch.dtype,
        max_size: int = -1,
    ) -> None:
        if key_dtype not in _KEY_DTYPES or value_dtype not in _VALUE_DTYPES:
            raise TypeError(
                "HashTable: key_dtype must be int32 or int64, and value_dtype one of those, "
                f"float32 or float64; got {key_dtype} and {value_dtype}."
            )
        device = torch.device(device)
        self.is_cpu = device.type == "cpu"
        self.key_dtype = key_dtype
        self.value_dtype = value_dtype
        self.keys_data = torch.empty(0, dtype=key_dtype, device=device)
        self.values_data = torch.empty(0, dtype=value_dtype, device=device)

    def insert(self, keys: Tensor, values: Tensor | None = None) -> None:
        """Insert keys that are not in the table; of repeated keys, the first.

        A key that is in the table keeps its value.

        Args:
            keys: ``[N]``.
            values: ``[N]``. Default: zeros.

        Raises:
            SpconvError: Shapes, dtypes or devices do not fit.
        """
        self._check(keys, values)
        if values is None:
            values = torch.zeros_like(keys, dtype=self.value_dtype)
        every_key = torch.cat([self.keys_data, keys])
        every_value = torch.cat([self.values_data, values])
        ordered, rows = torch.sort(every_key, stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        self.keys_data = ordered[first]
        self.values_data = every_value[rows[first]]

    def query(self, keys: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Look keys up.

        Args:
            keys: ``[N]``.
            values: ``[N]``, written in place where a key is found. Default: a new tensor of zeros.

        Returns:
            The values, and bool ``[N]``: the key is not in the table.

        Raises:
            SpconvError: Shapes, dtypes or devices do not fit.
        """
        self._check(keys, values)
        if values is None:
            values = torch.zeros_like(keys, dtype=self.value_dtype)
        places, is_empty = self._find(keys)
        if self.keys_data.shape[0]:
            values.copy_(torch.where(is_empty, values, self.values_data[places]))
        return values, is_empty

    def insert_exist_keys(self, keys: Tensor, values: Tensor) -> Tensor:
        """Change the values of keys that are in the table; of repeated keys, the last one counts.

        Args:
            keys: ``[N]``.
            values: ``[N]``.

        Returns:
            uint8 ``[N]``: 1 where the key is not in the table.

        Raises:
            SpconvError: Shapes, dtypes or devices do not fit.
        """
        self._check(keys, values)
        places, is_empty = self._find(keys)
        if self.keys_data.shape[0]:
            rows = torch.arange(keys.shape[0], device=keys.device).masked_fill(is_empty, -1)
            last = torch.full_like(self.keys_data, -1, dtype=torch.int64)
            last.scatter_reduce_(0, places, rows, "amax")
            changed = last >= 0
            self.values_data[changed] = values[last[changed]]
        return is_empty.to(torch.uint8)

    def assign_arange_(self) -> Tensor:
        """Set the values to 0, 1, 2, ... in the order of ``items``; return the count, int64 [1].

        Raises:
            SpconvError: Values are not integers.
        """
        if self.value_dtype.is_floating_point:
            raise SpconvError(
                "HashTable.assign_arange_ needs value_dtype int32 or int64; got "
                f"{self.value_dtype}."
            )
        size = self.keys_data.shape[0]
        self.values_data = torch.arange(
            size, dtype=self.value_dtype, device=self.values_data.device
        )
        return self._count(size)

    def items(self, max_size: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, ascending, their values and the count, int64 [1].

        Args:
            max_size: Return at most so many. Default: all, without room behind the last.
        """
        size = self.keys_data.shape[0]
        if max_size >= 0:
            size = min(size, max_size)
        return self.keys_data[:size].clone(), self.values_data[:size].clone(), self._count(size)

    def _count(self, size: int) -> Tensor:
        return torch.tensor([size], dtype=torch.int64, device=self.keys_data.device)

    def _find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return where each key is in the table, and whether it is not."""
        size = self.keys_data.shape[0]
        if size == 0:
            return torch.zeros_like(keys, dtype=torch.int64), torch.ones_like(keys).bool()
        places = torch.searchsorted(self.keys_data, keys.contiguous()).clamp_(max=size - 1)
        return places, self.keys_data[places] != keys

    def _check(self, keys: Tensor, values: Tensor | None) -> None:
        if keys.ndim != 1 or keys.dtype != self.key_dtype or keys.device != self.keys_data.device:
            raise SpconvError(
                f"HashTable: keys must be {self.key_dtype} [N] on {self.keys_data.device}; got "
                f"{keys.dtype} {list(keys.shape)} on {keys.device}."
            )
        if values is not None and (
            values.shape != keys.shape
            or values.dtype != self.value_dtype
            or values.device != keys.device
        ):
            raise SpconvError(
                f"HashTable: values must be {self.value_dtype} {list(keys.shape)} on "
                f"{keys.device}; got {values.dtype} {list(values.shape)} on {values.device}."
            )
