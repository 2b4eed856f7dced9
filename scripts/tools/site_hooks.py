"""Hooks of the documentation site, which mkdocs.yml names."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):(?=<code)")


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles of Sphinx before names in docstrings: Markdown has none."""
    return _ROLE.sub("", html)
