"""The command ``tritonspconv``; ``python -m tritonspconv`` is the same.

Each subcommand is a module with two functions. ``add_arguments(parser)`` adds its arguments.
``run(args)`` does the work, prints for people, and returns the exit status and a report for
``--json``. The docstring of the module is the help of the subcommand.
"""

from tritonspconv.cli.main import CommandError, main

__all__ = ["CommandError", "main"]
