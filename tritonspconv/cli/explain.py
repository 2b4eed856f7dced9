"""Tell more about an error: the entry of the troubleshooting page that the message names.

tritonspconv explain                  # the names of all entries
tritonspconv explain int32-coords     # what it means, and what to do
"""

from __future__ import annotations

import argparse
import difflib
import re
from typing import Any

from tritonspconv.cli.errors import CommandError
from tritonspconv.guide import documentation_site, entries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "entry", nargs="?", help="the name behind 'More:' in a message (default: list all names)"
    )


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Print an entry, or the names of all; return the exit status and the report."""
    known = {name: plain_text(text) for name, text in entries().items()}
    if args.entry is None:
        width = max(map(len, known)) + 2
        for name, text in known.items():
            print(f"{name:{width}}{text.splitlines()[0]}")
        return 0, known
    if args.entry not in known:
        near = difflib.get_close_matches(args.entry, known, 1)
        hint = f"Did you mean {near[0]}?" if near else "List all: tritonspconv explain"
        raise CommandError(f"no entry {args.entry!r}. {hint}")
    print(known[args.entry])
    return 0, {args.entry: known[args.entry]}


def plain_text(markdown: str) -> str:
    """Return text for a terminal: a link becomes its words and the place of its page.

    Example:
        >>> plain_text("see [your own scans](files.md)")
        'see your own scans (docs/files.md)'
    """
    site = documentation_site()

    def link(found: re.Match[str]) -> str:
        words, page, anchor = found.groups()
        place = f"{site}/{page}/{anchor or ''}" if site else f"docs/{page}.md{anchor or ''}"
        return f"{words} ({place})"

    return re.sub(r"\[([^\]]+)\]\(([\w/-]+)\.md(#[\w-]+)?\)", link, markdown)
