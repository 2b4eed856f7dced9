"""CoordinateMapKey: the name of a coordinate map in its manager."""

from __future__ import annotations

from collections.abc import Sequence

from compat.minkowski._errors import MinkowskiError

KeyValue = tuple[tuple[int, ...], str]


class CoordinateMapKey:
    """Tensor stride and string id of a coordinate map; compared and hashed by value.

    Args:
        coordinate_size: ``1 + D``, for a key yet to be set; or the tensor stride, one int per axis.
        string_id: Tells apart maps of one tensor stride. A string id needs a tensor stride.
    """

    __slots__ = ("_coordinate_size", "_text", "_value")

    def __init__(self, coordinate_size: int | Sequence[int], string_id: str | None = None) -> None:
        self._value: KeyValue | None = None
        # The value for compiled graphs, which take text as a constant, and numbers as variables.
        self._text = ""
        if isinstance(coordinate_size, int):
            if string_id is not None:
                raise MinkowskiError(
                    "CoordinateMapKey takes a coordinate size, or a tensor stride and a string id; "
                    f"got {coordinate_size} and {string_id!r}. Pass the tensor stride as a list."
                )
            self._coordinate_size = coordinate_size
        else:
            self._coordinate_size = 1 + len(coordinate_size)
            self.set_key(coordinate_size, string_id or "")

    @classmethod
    def of(cls, value: KeyValue) -> CoordinateMapKey:
        """Return the key with a value."""
        return cls(*value)

    @property
    def value(self) -> KeyValue:
        """Tensor stride and string id, hashable.

        Raises:
            MinkowskiError: The key is not set.
        """
        if self._value is None:
            raise MinkowskiError(
                "the coordinate map key is not set: pass a key that a tensor or a coordinate "
                "manager returned."
            )
        return self._value

    def is_key_set(self) -> bool:
        """Return whether the key has a value."""
        return self._value is not None

    def get_key(self) -> tuple[list[int], str]:
        """Return tensor stride and string id."""
        tensor_stride, string_id = self.value
        return list(tensor_stride), string_id

    def set_key(self, tensor_stride: Sequence[int], string_id: str) -> None:
        """Give the key its value, once.

        Raises:
            MinkowskiError: The key has a value, or the stride has another number of axes.
        """
        if self._value is not None:
            raise MinkowskiError(f"{self} is set; make a new CoordinateMapKey.")
        if 1 + len(tensor_stride) != self._coordinate_size:
            raise MinkowskiError(
                f"a key of coordinate size {self._coordinate_size} takes a tensor stride of "
                f"{self._coordinate_size - 1} axes; got {list(tensor_stride)}."
            )
        self._value = steps, _ = tuple(int(step) for step in tensor_stride), string_id
        self._text = f"{' '.join(map(str, steps))}:{string_id}"

    def given_to(self, key: CoordinateMapKey | None) -> CoordinateMapKey:
        """Give another key, not set yet, the value of this one; return a key with the value."""
        if key is None:
            return self
        key.set_key(*self.get_key())
        return key

    def get_tensor_stride(self) -> list[int]:
        """Return the tensor stride, one int per axis."""
        return list(self.value[0])

    def get_coordinate_size(self) -> int:
        """Return ``1 + D``."""
        return self._coordinate_size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CoordinateMapKey) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        if self._value is None:
            return "coordinate map key:"
        tensor_stride, string_id = self._value
        return f"coordinate map key:{list(tensor_stride)}{f':{string_id}' if string_id else ''}"
