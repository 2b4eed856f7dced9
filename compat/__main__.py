"""``python -m compat --as spconv -- train.py ...``: run a program on an adapter, without edits."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from compat._install import aliases_of, announce

_DESCRIPTION = """\
Run a Python program in which the import names of another library mean its adapter, in the program
and in every Python process that it starts. What follows -- is what would follow "python":

  python -m compat --as spconv -- tools/train.py --epochs 80
  python -m compat --as spconv -- -m package.train
  torchrun --nproc-per-node 8 -m compat --as spconv -- tools/train.py
"""


def main(
    arguments: Sequence[str], *, module: str = "compat", description: str = _DESCRIPTION
) -> NoReturn:
    """Replace this process by Python running the program, with the switch made at start-up.

    The program runs as under plain ``python``: same ``sys.argv``, ``sys.path``, ``__main__``,
    tracebacks and exit status, in the same process id.

    Args:
        arguments: Command line after ``python -m compat``, or after ``tritonspconv run``.
        module: The module that Python was started with: ``"compat"`` or ``"tritonspconv"``.
        description: Help text of the command.
    """
    prog = "python -m compat" if module == "compat" else f"{module} run"
    parser, libraries, command = _parse(arguments, prog, description)
    environment = dict(os.environ)
    for library in libraries:
        try:
            aliases_of(library)
        except ValueError as error:
            parser.error(str(error))
        announce(library, environment)
    if not command:
        parser.error("a program must follow --: SCRIPT, -m MODULE or -c CODE; got nothing.")
    if command[0].startswith("-") and not command[0].startswith(("-m", "-c")):
        parser.error(
            f"SCRIPT, -m MODULE or -c CODE must follow --; got {command[0]!r}. Put options of "
            f"Python itself before -m {module}."
        )
    if sys.flags.ignore_environment or sys.flags.no_site:
        parser.error(
            "Python must read PYTHONPATH and sitecustomize; got -E, -I or -S. Leave them out, or "
            "call compat.install in the program."
        )
    sys.stdout.flush()
    sys.stderr.flush()
    # "run" stands before the arguments of the other command.
    count = len(arguments) + (module != "compat")
    options = _interpreter_options(sys.orig_argv, count, module)
    os.execve(sys.executable, [sys.executable, *options, *command], environment)


def _parse(
    arguments: Sequence[str], prog: str, description: str
) -> tuple[argparse.ArgumentParser, list[str], list[str]]:
    """Return the parser, the libraries and the program's command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} --as LIBRARY -- {{SCRIPT | -m MODULE | -c CODE}} [ARGUMENT ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--as",
        dest="libraries",
        metavar="LIBRARY",
        action="append",
        required=True,
        help="the library whose import names mean the adapter: spconv or MinkowskiEngine",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    # The arguments are split by hand, because releases of argparse disagree about "--" before and
    # within a remainder.
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:cut])
    rest = list(arguments[cut + 1 :])
    command = [*options.command, *arguments[cut : cut + 1], *rest] if options.command else rest
    return parser, options.libraries, command


def _interpreter_options(
    original: Sequence[str], n_arguments: int, module: str = "compat"
) -> list[str]:
    """Return Python's own options from ``[python, *options, "-m", module, *arguments]``.

    Args:
        original: ``sys.orig_argv``.
        n_arguments: Arguments after the module.
        module: The module.
    """
    head = list(original[1 : len(original) - n_arguments])
    # "-m compat" or "-mcompat", either perhaps with one-letter options in front: "-um compat".
    switch = "".join(head[-2:] if head[-1:] == [module] else head[-1:])
    if not switch.startswith("-") or not switch.endswith(f"m{module}"):
        return []
    flags = switch.removesuffix(f"m{module}")
    rest = head[:-2] if head[-1] == module else head[:-1]
    return rest if flags == "-" else [*rest, flags]


if __name__ == "__main__":
    main(sys.argv[1:])
