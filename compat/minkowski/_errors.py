"""The exception of MinkowskiEngine's checks, and advice that several of them give."""

BATCH_INDEX_FIRST = (
    "Coordinates are [N, 1 + D], batch index first: utils.batched_coordinates puts it there."
)


class MinkowskiError(AssertionError, ValueError, RuntimeError):
    """A check of MinkowskiEngine's failed.

    MinkowskiEngine reports mistakes as an AssertionError in Python and as a RuntimeError from its
    compiled code. Code that catches either, or a ValueError, keeps working.
    """
