"""The exception of spconv's checks."""


class SpconvError(AssertionError, ValueError, RuntimeError):
    """A check of spconv's failed.

    spconv reports one mistake as an AssertionError, a ValueError or a RuntimeError, depending on
    the algorithm and the device. Code that catches any of them keeps working.
    """
