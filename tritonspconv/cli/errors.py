"""The error that ends a subcommand with one line."""


class CommandError(Exception):
    """The command cannot do what was asked; its message says why and what to do.

    The command line prints the message in one line and returns the exit status 2.
    """
