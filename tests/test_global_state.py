"""The architecture page lists all state of the engine and the adapters that outlives a call."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests._process import ROOT

PAGE = (ROOT / "tritonspconv" / "README.md").read_text(encoding="utf-8")
# Methods that change the object they belong to; ``join`` is LayerFamily's.
CHANGING = {
    "add", "append", "clear", "discard", "extend", "insert", "join", "pop", "popitem", "remove",
    "set", "setdefault", "update",
}  # fmt: skip


def written_names(source: str) -> set[str]:
    """Return the module's names whose values functions of the module write to, or replace.

    Names that the module imports from other packages do not count.
    """
    tree = ast.parse(source)
    own = set(_names_of_module(tree))
    found = set()
    for function in _outermost_functions(tree):
        nodes = list(ast.walk(function))
        found |= {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
        written = own.intersection(map(_written, nodes)) - found
        if written:
            found |= written - _local_names(function)
    return found


def _outermost_functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.stmt | ast.excepthandler):
            yield from _outermost_functions(node)


def _names_of_module(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            targets = []
        for target in targets:
            yield from _stored(target)
        if isinstance(node, ast.ImportFrom) and re.match(r"(tritonspconv|compat)\b", node.module):
            yield from (alias.asname or alias.name for alias in node.names)


def _local_names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    arguments = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    return arguments.union(_stored(function))


def _stored(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _written(node: ast.AST) -> str | None:
    """Return the first name of the expression that a node writes to; None: it writes to none."""
    written = None
    if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
        written = node.value
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in CHANGING
    ):
        written = node.func.value
    while isinstance(written, ast.Attribute | ast.Subscript):
        written = written.value
    return written.id if isinstance(written, ast.Name) else None


def test_the_page_lists_every_name_that_functions_write_to():
    listed = set(
        re.findall(
            r"^\| `(\w+)` \| `([\w/.]+)` \|",
            PAGE.partition("## State")[2].partition("\n## ")[0],
            re.MULTILINE,
        )
    )
    found = {
        (name, str(path.relative_to(ROOT)))
        for package in ("tritonspconv", "compat")
        for path in (ROOT / package).rglob("*.py")
        for name in written_names(path.read_text(encoding="utf-8"))
    }
    assert found == listed


@pytest.mark.parametrize(
    "body",
    [
        "def f(x):\n    CACHE[x] = 1",
        "def f(x):\n    del CACHE[x]",
        "def f(x):\n    CACHE[x].n += 1",
        "def f(x):\n    CACHE.update(x)",
        "def f(x):\n    CACHE.setdefault(x, []).append(1)",
        "def f(x):\n    CACHE.size = x",
        "class A:\n    def f(self, x):\n        CACHE.add(x)",
        "def f(x):\n    global CACHE\n    CACHE = x",
    ],
)
def test_a_write_is_found(body):
    assert written_names(f"CACHE = {{}}\n{body}\n") == {"CACHE"}
    assert written_names(f"from compat.a import CACHE\n{body}\n") == {"CACHE"}


@pytest.mark.parametrize(
    "body",
    [
        "def f(x):\n    CACHE = {}\n    CACHE[x] = 1",
        "def f(CACHE):\n    CACHE[0] = 1",
        "def f(x):\n    return CACHE[x]",
        "CACHE[0] = 1",
    ],
)
def test_reads_and_local_names_are_no_writes(body):
    assert not written_names(f"CACHE = {{}}\n{body}\n")
