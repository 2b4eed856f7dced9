"""The error that ends a subcommand with one line."""


class CommandError(Exception):
    """The command cannot run as requested; the message gives the reason and a remedy.

    The command line prints the message in one line and returns the exit status 2.
    """
