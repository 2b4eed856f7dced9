"""The exception of spconv's checks, and errors that several modules raise."""

from tritonspconv.guide import more


class SpconvError(AssertionError, ValueError, RuntimeError):
    """A check of spconv's failed.

    spconv reports one mistake as an AssertionError, a ValueError or a RuntimeError, depending on
    the algorithm and the device. Code that catches any of them keeps working.
    """


def points_vanished(n_in: int, where: str) -> SpconvError:
    """Return the error of a layer that leaves none of its input sites."""
    return SpconvError(
        f'no output site is left of {n_in} input sites ("points vanished"): {where}. Check that '
        "indices lie in spatial_shape and batch_size, or add padding." + more("points-vanish")
    )
