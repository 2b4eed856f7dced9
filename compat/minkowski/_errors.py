"""The exception of MinkowskiEngine's checks."""


class MinkowskiError(AssertionError, ValueError, RuntimeError):
    """A check of MinkowskiEngine's failed.

    MinkowskiEngine reports mistakes as an AssertionError in Python and as a RuntimeError from its
    compiled code. Code that catches either, or a ValueError, keeps working.
    """
