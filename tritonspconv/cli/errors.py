"""Errors that end a subcommand with one line."""

from __future__ import annotations

# The extra of pyproject.toml that installs a package.
_EXTRAS = {"matplotlib": "demo", "numpy": "demo", "plyfile": "demo", "pypcd4": "demo"}


class CommandError(Exception):
    """The command cannot run as requested; the message gives the reason and a remedy.

    The command line prints the message in one line and returns the exit status 2.
    """


def without_package(error: ImportError) -> str:
    """Return the message of an error, with the command that installs the missing package."""
    top = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or top not in _EXTRAS:
        return str(error)
    return f"{top} is not installed. To install it: pip install 'tritonspconv[{_EXTRAS[top]}]'"
