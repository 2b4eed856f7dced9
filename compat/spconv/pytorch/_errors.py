"""The exception of spconv's checks, and errors that several modules raise."""

from __future__ import annotations

from collections.abc import Sequence

from tritonspconv.guide import more


class SpconvError(AssertionError, ValueError, RuntimeError):
    """A check of spconv's failed.

    spconv reports one mistake as an AssertionError, a ValueError or a RuntimeError, depending on
    the algorithm and the device. Code that catches any of them keeps working.
    """


def grid_vanished(what: object, shape: Sequence[int], out_shape: Sequence[int]) -> SpconvError:
    """Return the error of a convolution or pool whose output has an extent below 1."""
    return SpconvError(
        f"{what} would turn spatial shape {list(shape)} into {list(out_shape)}: every extent must "
        "be at least 1. Use a larger spatial_shape, more padding or a smaller kernel."
        + more("small-grid")
    )


def rows_differ(what: str, rows: int, sites: int) -> SpconvError:
    """Return the error of a tensor with other rows of features than of indices."""
    return SpconvError(
        f"{what}: the tensor has {rows} rows of features and {sites} of indices. After "
        "replace_feature with another number of rows, assign indices."
    )


def points_vanished(n_in: int, where: str) -> SpconvError:
    """Return the error of a layer that leaves none of its input sites."""
    return SpconvError(
        f'no output site is left of {n_in} input sites ("points vanished"): {where}. Check that '
        "indices lie in spatial_shape and batch_size, or add padding." + more("points-vanish")
    )
