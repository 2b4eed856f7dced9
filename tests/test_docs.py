"""The code of the pages runs, links lead somewhere, and tables and drawings are up to date."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from scripts.tools import draw_concepts, name_tables, support_table
from tests._process import run, write

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WITH_CODE = [page for page in sorted(DOCS.rglob("*.md")) if "```python" in page.read_text()]
# AOTInductor takes minutes; tests/export compiles a smaller program.
LEFT_OUT = re.compile(r"^torch\._inductor\.aoti_compile_and_package\(.*\)$", re.MULTILINE)
# Every public name of these is in the reference.
REFERENCE = [
    f"tritonspconv{part}"
    for part in ("", ".nn", ".ops", ".points", ".profile", ".training", ".testing")
]
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_code_runs(page: Path, tmp_path: Path):
    # The code runs from a file, because torch.fx and warnings of capture name source lines.
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    run(write(tmp_path, "page.py", LEFT_OUT.sub("", "\n".join(blocks))), cwd=tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://", "#")):
            continue
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve()
        assert found.exists(), f"{page.name}: {link}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, f"{page.name}: {link}"


@pytest.mark.parametrize(("page", "module"), name_tables.PAGES.items())
def test_tables_of_names_are_those_of_the_code(page, module):
    text = (DOCS / page).read_text()
    message = "out of date: run python -m scripts.tools.name_tables"
    assert name_tables.with_table(text, name_tables.table(module)) == text, message


@pytest.mark.slow
def test_the_table_of_support_is_that_of_the_code():
    text = (DOCS / "support.md").read_text()
    found = support_table.with_table(text, support_table.table(torch.device("cpu")))
    assert found == text, "out of date: run python -m scripts.tools.support_table"


def test_drawings_are_those_of_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(draw_concepts, "IMAGES", tmp_path)
    draw_concepts.main()
    for name in ("kinds.svg", "map.svg", "taps.svg"):
        drawn = (tmp_path / name).read_text()
        kept = (DOCS / "img" / name).read_text()
        assert drawn == kept, "run python -m scripts.tools.draw_concepts"


def test_every_page_is_in_the_navigation():
    navigation = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    # The tables of parity are data of the repository; mkdocs.yml leaves them out.
    pages = {page for page in pages if not page.startswith("parity/")}
    assert set(navigation) == pages


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason="the site needs pip install '.[docs]'")
    pytest.importorskip("material", reason="the site needs pip install '.[docs]'")
    run("-m", "mkdocs", "build", "--strict", "-d", tmp_path / "site", cwd=ROOT)
    pages = sorted((tmp_path / "site" / "reference").rglob("index.html"))
    assert len(pages) == 7
    reference = "".join(page.read_text() for page in pages)
    assert ":class:" not in reference
    # A section of a docstring whose name mkdocstrings does not know becomes a box.
    assert set(re.findall(r'<details class="([\w-]+)"', reference)) <= {"example"}
    shown = set(re.findall(r'id="[\w.]*?(\w+)"', reference))
    for module in REFERENCE:
        assert set(importlib.import_module(module).__all__) - {"__version__"} - shown == set(), (
            module
        )
