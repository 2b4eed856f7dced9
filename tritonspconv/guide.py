"""The last line of an error message: where to read more.

`more` names an entry of ``docs/troubleshooting.md`` by its heading. Headings are short and never
change: ``int32-coords``. If the metadata of the package names a documentation site, the line gives
the entry's address. Otherwise the line gives the command that prints the entry in a terminal,
``tritonspconv explain int32-coords``. tests/test_troubleshooting.py raises an error for each entry.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

# The page, which a wheel holds too. In the repository the name is a link into docs/.
PAGE = Path(__file__).with_name("troubleshooting.md")
_MARK = "\nMore: "


def more(entry: str) -> str:
    r"""Return the line that ends a message, with the line break before it.

    Call this function only where an error is raised: it reads the metadata of the package.

    Args:
        entry: The heading of an entry of the page.

    Example:
        >>> more("int32-coords")
        '\nMore: tritonspconv explain int32-coords'
    """
    site = documentation_site()
    place = f"{site}/troubleshooting/#{entry}" if site else f"tritonspconv explain {entry}"
    return f"{_MARK}{place}"


def without_more(message: str) -> str:
    """Return a message without that line, for a message that quotes another."""
    return message.partition(_MARK)[0]


def entry_of(message: str) -> str | None:
    """Return the name of the entry that a message ends with; None: it names none."""
    found = re.search(rf"{_MARK}\S.*?([a-z0-9-]+)$", message)
    return found[1] if found else None


def longer(message: str, words: str) -> str:
    """Return a message with further words, which stand before that line if there is one."""
    told, mark, place = message.partition(_MARK)
    return f"{told} {words}{mark}{place}"


def entries() -> dict[str, str]:
    """Return the entries of the page in Markdown, by their headings.

    Raises:
        OSError: The page cannot be read.
    """
    parts = re.split(r"^#{2,3} (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = zip(parts[1::2], parts[2::2], strict=True)
    return {name: text.strip() for name, text in found if re.fullmatch(r"[a-z0-9-]+", name)}


def documentation_site() -> str | None:
    """Return the site's address, without a slash at its end; None: the metadata name none."""
    try:
        urls = metadata.metadata("tritonspconv").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return None
    named = dict(url.split(", ", 1) for url in urls if ", " in url)
    site = named.get("Documentation")
    return site.rstrip("/") if site else None
