"""docs/errors.md has the messages of the code."""

import importlib.util

import pytest

from tests._process import ROOT


@pytest.mark.filterwarnings("ignore")
def test_the_page_is_what_the_mistakes_get():
    spec = importlib.util.spec_from_file_location(
        "error_page", ROOT / "scripts" / "tools" / "error_page.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), (
        "docs/errors.md is not what the calls say now; run python scripts/tools/error_page.py"
    )
