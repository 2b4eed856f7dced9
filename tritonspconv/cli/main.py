"""Choose the subcommand, run it, and turn errors into one line."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tritonspconv.cli.errors import CommandError, without_package
from tritonspconv.guide import more, without_more

# Name -> the module, and the line of the overview.
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("tritonspconv.cli.doctor", "check this installation: versions, devices, results"),
    "demo": (
        "tritonspconv.demo.command",
        "run two networks on a scan: table, check, picture",
    ),
    "view": ("tritonspconv.cli.view", "show a scan and its voxels as PNG or as an HTML page"),
    "train": ("tritonspconv.cli.train", "train a segmentation or a detection network on scans"),
    "bench": ("tritonspconv.bench.command", "time layers and networks beside other libraries"),
    "verify": ("tritonspconv.verify.command", "check every layer of two networks against float64"),
    "profile": ("tritonspconv.cli.profile", "show where a network's time and memory go"),
    "parity": ("tritonspconv.cli.parity", "compare an adapter with its original, case by case"),
    "convert": ("tritonspconv.cli.convert", "convert a checkpoint to the weight layout of today"),
    "tune": ("tritonspconv.cli.tune", "search faster tiles for your channels on this GPU"),
    "explain": ("tritonspconv.cli.explain", "tell more about an error that has a name"),
    "run": ("tritonspconv.cli.run", "run a program with spconv or MinkowskiEngine replaced"),
}
USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: The arguments behind ``tritonspconv``; None: the arguments of this process.

    Returns:
        The exit status: 0, 1 where a check found something wrong, or 2 where the command could not
        do its work.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from tritonspconv import __version__

        print(f"tritonspconv {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(COMMANDS)}."
        return _fail("", f"no command {name!r}. {hint}")
    try:
        return _run(name, arguments[1:])
    except KeyboardInterrupt:
        return _fail(name, "interrupted") and 130
    except BrokenPipeError:
        # The reader of the output has closed it, so no message can be printed.
        sys.stderr.close()
        return 1


def _run(name: str, arguments: Sequence[str]) -> int:
    try:
        module = importlib.import_module(COMMANDS[name][0])
    except ImportError as error:
        return _fail(name, without_package(error))
    if name == "run":
        return module.start(arguments)
    parser = _Parser(
        prog=f"tritonspconv {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.add_argument(
        "--json",
        type=_json_file,
        metavar="FILE",
        help="write the report to FILE.json; - for standard output, and all else to standard error",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    args = parser.parse_args(arguments)
    try:
        with contextlib.ExitStack() as stack:
            if args.json == "-":
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            status, report = module.run(args)
    except ImportError as error:
        if args.traceback:
            raise
        return _fail(name, without_package(error))
    except (CommandError, NotImplementedError, OSError, ValueError) as error:
        if args.traceback or isinstance(error, BrokenPipeError):
            raise
        return _fail(name, str(error) or type(error).__name__)
    except RuntimeError as error:
        if args.traceback or not _is_out_of_memory(error):
            raise
        told = f"the device is out of memory. Use fewer points. {error}"
        return _fail(name, told + more("out-of-memory"))
    _write_report(report, args.json)
    return status


def _write_report(report: Any, target: str | Path | None) -> None:
    if target is None:
        return
    text = json.dumps(report, indent=1, default=str) + "\n"
    if isinstance(target, Path):
        target.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.cuda.OutOfMemoryError)


def _json_file(text: str) -> str | Path:
    # If a user puts a scan behind --json by mistake, the command must not overwrite it.
    if text != "-" and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"must be - or a name that ends in .json; got {text!r}")
    return text if text == "-" else Path(text)


def _fail(name: str, message: str) -> int:
    """Print a message in one line and return the exit status."""
    prefix = f"tritonspconv {name}".strip()
    print(f"{prefix}: {' '.join(message.split())}", file=sys.stderr)
    return USAGE


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: tritonspconv COMMAND [ARGUMENT ...]", "", "commands:"]
    lines += [f"  {name:{width}}{summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", "tritonspconv COMMAND --help tells more. Every command but run has --json."]
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and where to find help; exit with status 2."""
        told = without_more(message)
        line = f"{self.prog}: {told}. See {self.prog} --help.{message[len(told) :]}"
        self.exit(USAGE, f"{' '.join(line.split())}\n")
