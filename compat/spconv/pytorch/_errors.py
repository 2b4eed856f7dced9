"""The exception of spconv's checks, and the messages for names that are not provided."""

from collections.abc import Callable, Mapping
from typing import NoReturn


class SpconvError(AssertionError, ValueError, RuntimeError):
    """A check of spconv's failed.

    spconv reports one mistake as an AssertionError, a ValueError or a RuntimeError, depending on
    the algorithm and the device. Code that catches any of them keeps working.
    """


def missing_names(module: str, alternatives: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """Return a module ``__getattr__`` that says what to use instead of an absent name.

    Args:
        module: The module's name in messages.
        alternatives: What to do instead, per absent name.
    """

    def getattr_(name: str) -> NoReturn:
        hint = alternatives.get(name)
        text = f"module {module!r} has no attribute {name!r}"
        raise AttributeError(text if hint is None else f"{text}: not provided. {hint}")

    return getattr_
