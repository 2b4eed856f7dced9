"""Change one operator, constant or condition at a time, and see whether the tests notice.

    python scripts/tools/mutate.py --count 150 --results mutants.jsonl      # hours on two cores
    python scripts/tools/mutate.py --results mutants.jsonl --table docs/mutants.md

Each mutant runs in a process of its own, on a copy of the checkout, against its module's tests.
Start an interrupted run again, and it continues. ``scripts/tools/survivors.toml`` explains
survivors, by kind.

The draw leaves out what computes nothing: error messages, the texts of objects, types, imports
and assertions. ``strict=True`` of ``zip`` is such an assertion. The draw also leaves out constants
of modules, most of which are thresholds of speed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from scripts.tools.module_tests import LEFT_OUT, tests_of  # noqa: E402

EXPLANATIONS = Path(__file__).with_name("survivors.toml")

_COMPARE = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
_BINARY = {ast.Add: "-", ast.Sub: "+", ast.Mult: "//", ast.FloorDiv: "*", ast.Mod: "//"}
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}


class Mutant(NamedTuple):
    """One change of one file.

    Attributes:
        path: The file, from the root of the checkout.
        line: Its number.
        before: The line as it is.
        after: The line as it becomes.
        start: Start of the replaced text, in bytes of the file.
        stop: Its end.
        text: The text that takes its place.
    """

    path: str
    line: int
    before: str
    after: str
    start: int
    stop: int
    text: str

    @property
    def key(self) -> str:
        """A name that stays the same when other lines of the file change."""
        return f"{self.path}: {self.before} -> {self.after}"


def mutants_of(path: str, source: str) -> list[Mutant]:
    """Return every mutant of a module, in the order of its text."""
    lines = source.encode().splitlines(keepends=True)
    begins = [0]
    for line in lines:
        begins.append(begins[-1] + len(line))
    found = []
    for node, text in _changes(ast.parse(source), source):
        start = begins[node.lineno - 1] + node.col_offset
        stop = begins[(node.end_lineno or 1) - 1] + (node.end_col_offset or 0)
        data = source.encode()
        changed = (data[:start] + text.encode() + data[stop:]).decode()
        with contextlib.suppress(SyntaxError, IndexError):
            ast.parse(changed)
            before = lines[node.lineno - 1].decode().strip()
            after = changed.splitlines()[node.lineno - 1].strip()
            if before != after:
                found.append(Mutant(path, node.lineno, before, after, start, stop, text))
    return sorted(set(found), key=lambda mutant: (mutant.start, mutant.text))


def _changes(tree: ast.Module, source: str) -> Iterator[tuple[ast.expr, str]]:
    """Yield expressions and what to put in their place."""
    for node in _judged(tree):
        part = lambda x: ast.get_source_segment(source, x)  # noqa: E731
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            operator = _COMPARE[type(node.ops[0])]
            yield node, f"{part(node.left)} {operator} {part(node.comparators[0])}"
        elif isinstance(node, ast.BoolOp):
            word = " or " if isinstance(node.op, ast.And) else " and "
            yield node, f"({word.join(f'({part(value)})' for value in node.values)})"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, f"({part(node.operand)})"
        elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            yield node, f"(({part(node.left)}) {_BINARY[type(node.op)]} ({part(node.right)}))"
        elif isinstance(node, ast.IfExp):
            yield node, f"({part(node.orelse)} if {part(node.test)} else {part(node.body)})"
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, str(not node.value)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield node, str(node.value + 1)
        elif isinstance(node, ast.Name) and node.id in _CALLS:
            yield node, _CALLS[node.id]
        if isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Compare):
            yield node.test, f"not ({part(node.test)})"


# These compute nothing, and no test judges their mutants.
_UNJUDGED = (ast.Raise, ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)
_UNJUDGED_NAMES = ("__repr__", "extra_repr", "__str__")


def _judged(node: ast.AST) -> Iterator[ast.AST]:
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, _UNJUDGED):
                continue
            if isinstance(child, ast.FunctionDef) and child.name in _UNJUDGED_NAMES:
                continue
            # Most constants of modules are thresholds of speed, which no test judges.
            if isinstance(node, ast.Module) and isinstance(child, ast.Assign | ast.AnnAssign):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            yield child
            yield from _judged(child)


def chosen(count: int, seed: int, pattern: str) -> list[Mutant]:
    """Draw mutants of the modules that have tests.

    A module gets a share in proportion to the square root of the number of its mutants. A longer
    draw continues a shorter one.
    """
    placed = []
    for path in sorted(ROOT.glob(pattern)):
        name = str(path.relative_to(ROOT))
        if not tests_of(name):
            continue
        generator = random.Random(f"{seed} {name}")
        found = mutants_of(name, path.read_text())
        begin, step = generator.random(), max(len(found), 1) ** -0.5
        for number, mutant in enumerate(generator.sample(found, len(found))):
            if "strict=True" not in mutant.before or "strict=True" in mutant.after:
                placed.append(((begin + number) * step, mutant))
    return [mutant for _, mutant in sorted(placed)[:count]]


class Verdict(NamedTuple):
    """What the tests of a module say.

    Attributes:
        fate: "killed", "timeout", "survived" or "not tested".
        test: The test that failed or took too long.
        is_interpreted: True: Triton's interpreter ran the kernels of this test.
    """

    fate: str
    test: str = ""
    is_interpreted: bool = False


def run_tests(
    checkout: Path, runs: list[tuple[bool, list[str]]], limit: float, patience: float = math.inf
) -> Verdict:
    """Run tests, as `tests_of` returns them, in a copy of the checkout, up to the first failure.

    One test, and the collection of all tests, may take ``limit`` seconds. After ``patience``
    seconds no further test is waited for: the mutant has survived.
    """
    found_tests, end = False, time.monotonic() + patience
    for is_interpreted, names in runs:
        last = checkout / ".last_test"
        last.write_text("")
        process = os.fork()
        if process == 0:
            try:
                _run_pytest(checkout, is_interpreted, names, last)
            finally:
                os._exit(1)  # an error here must not go on in the caller's code
        # The child does the same: whichever is first.
        with contextlib.suppress(PermissionError):
            os.setpgid(process, process)
        status = _wait(process, last, limit, end)
        if status not in (0, _NO_TESTS):
            fate = "timeout" if status is None else "killed"
            return Verdict(fate, last.read_text(), is_interpreted)
        found_tests |= status == 0
    return Verdict("survived" if found_tests else "not tested")


_NO_TESTS = 5


class _LastTest:
    """A plugin of pytest that writes the name of each test to a file when the test begins."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._write(report.nodeid)

    def _write(self, name: str) -> None:
        # A process that has written beyond its memory may die here: the old name stays until then.
        new = self.file.with_suffix(".new")
        new.write_text(name)
        new.replace(self.file)


def _run_pytest(checkout: Path, is_interpreted: bool, names: list[str], last: Path) -> None:
    """Run pytest in this process, which is a child of its own group, and end the process."""
    os.setpgid(0, 0)
    os.chdir(checkout)
    sys.path[:0] = [str(checkout)]
    sys.dont_write_bytecode = True
    os.environ |= {"TRITON_INTERPRET": str(int(is_interpreted)), "PYTHONPATH": str(checkout)}
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    import pytest

    marks = "interpreter" if is_interpreted else "not interpreter and not gpu"
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=1"]
    # Slow tests check large sizes and whole programs: no small change concerns these alone.
    options += ["-m", f"({marks}) and not slow", "-k", "not many_rows and not large_windows"]
    os._exit(int(pytest.main([*options, *names], plugins=[_LastTest(last)])))


def _wait(process: int, last: Path, limit: float, end: float) -> int | None:
    """Return a child's exit status; None where a test takes too long.

    A child that runs at the time ``end`` is stopped, and counts as one whose tests pass.
    """
    is_late = is_slow = False
    while not (is_late or is_slow):
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
        is_late = time.monotonic() >= end
        is_slow = time.time() - last.stat().st_mtime >= limit
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None if is_slow else 0


@contextlib.contextmanager
def _applied(mutant: Mutant, checkout: Path) -> Iterator[None]:
    """Change the file; then put back its text, its time and what numba compiled of its folder.

    numba compiles a file again if its time has changed, which takes longer than most tests.
    """
    path = checkout / mutant.path
    data, times = path.read_bytes(), path.stat()
    compiled, kept = path.parent / "__pycache__", checkout / ".kept"
    if compiled.exists():
        shutil.copytree(compiled, kept)
    path.write_bytes(data[: mutant.start] + mutant.text.encode() + data[mutant.stop :])
    yield
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    if kept.exists():
        shutil.rmtree(compiled)
        kept.rename(compiled)


def run(
    mutants: list[Mutant], results: Path, limit: float, patience: float, interprets: bool
) -> None:
    """Judge mutants that ``results`` does not hold, and add a line for each.

    A mutant counts as killed only if the test that killed it passes without the change.
    """
    known = {entry["key"] for entry in _read(results)}
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        ignored = shutil.ignore_patterns(".git", "*.pyc", ".venv*", ".hypothesis")
        shutil.copytree(ROOT, checkout, ignore=ignored)
        sound: dict[Verdict, bool] = {}
        for number, mutant in enumerate(mutants):
            if mutant.key in known:
                continue
            runs = [run for run in tests_of(mutant.path) if interprets or not run[0]]
            begin = time.monotonic()
            with _applied(mutant, checkout):
                verdict = run_tests(checkout, runs, limit, patience)
            seconds = round(time.monotonic() - begin, 1)
            if verdict.fate == "not tested":
                print(f"{mutant.path}: it has no tests that run here")
                continue
            if not verdict.test and verdict.fate != "survived":
                print(f"{mutant.path}: pytest ended before its first test")
                continue
            if verdict.test and verdict not in sound:
                alone = [(verdict.is_interpreted, [verdict.test])]
                sound[verdict] = run_tests(checkout, alone, limit).fate == "survived"
            if not sound.get(verdict, True):
                print(f"{mutant.path}: {verdict.test} fails without a change")
                continue
            entry = {"key": mutant.key, "fate": verdict.fate, "line": mutant.line}
            entry |= {"test": verdict.test, "seconds": seconds}
            with results.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(f"{number + 1}/{len(mutants)} {verdict.fate} in {seconds} s: {mutant.key}")


def _read(results: Path) -> list[dict]:
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


def explained(file: Path = EXPLANATIONS) -> dict[str, tuple[str, str]]:
    """Return the kind of each explained survivor and why no test fails, by the mutant's key."""
    kinds = tomllib.loads(file.read_text())  # pyright: ignore
    return {key: (kind, why) for kind, part in kinds.items() for key, why in part.items()}


def table(entries: list[dict], explanations: dict[str, tuple[str, str]]) -> str:
    """Return the page that lists the fates of the mutants."""
    fates = Counter(entry["fate"] for entry in entries)
    killed = fates["killed"] + fates["timeout"]
    survivors = sorted(entry["key"] for entry in entries if entry["fate"] == "survived")
    rows = [(key, *explanations.get(key, ("-", "not explained yet"))) for key in survivors]
    equivalent = sum(kind == "equivalent" for _, kind, _ in rows)
    share = 100 * killed / max(len(entries), 1)
    others = len(entries) - equivalent
    modules = {entry["key"].partition(": ")[0] for entry in entries}
    left_out = "; ".join(f"`{name}`: {why}" for name, why in LEFT_OUT.items())
    lines = [
        "# Mutants", "",
        "`scripts/tools/mutate.py` changes one operator, constant or condition of a module and "
        "runs the module's tests. It draws changes by a seed among all modules; the more code a "
        "module has, the likelier it is drawn. This is its last run.", "",
        f"{len(entries)} mutants of {len(modules)} modules: {killed} killed "
        f"({share:.0f} %), {fates['timeout']} of them by the time "
        f"limit; {len(rows)} survived. {equivalent} of the survivors are equivalent to the code: "
        f"no input shows a difference. Of the {others} others, "
        f"{100 * killed / max(others, 1):.1f} % are killed.", "",
        "The draw leaves out what computes nothing: error messages, the texts of objects, types, "
        "imports, assertions, and `strict=True` of `zip`, which is an assertion too. It leaves out "
        "constants of modules, most of which are thresholds of speed.", "",
        f"It leaves out these modules. {left_out}.", "",
        "## By folder", "", "| folder | killed | survived |", "| --- | --- | --- |",
    ]  # fmt: skip
    by_folder: dict[str, Counter[bool]] = {}
    for entry in entries:
        folder = entry["key"].partition(": ")[0].rpartition("/")[0]
        by_folder.setdefault(folder, Counter())[entry["fate"] == "survived"] += 1
    lines += [f"| `{folder}` | {n[False]} | {n[True]} |" for folder, n in sorted(by_folder.items())]
    lines += ["", "## Survivors", "", "| change | kind | why no test fails |"]
    lines += ["| --- | --- | --- |"]
    for key, kind, why in rows:
        path, _, change = key.partition(": ")
        change = change.replace("|", "\\|").replace(" -> ", "` → `", 1)
        lines.append(f"| {path}: `{change}` | {kind} | {why} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run mutants, or write their table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=150, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--modules", default="**/*.py", help="pattern of files, from the root")
    parser.add_argument("--limit", type=float, default=200, help="seconds for one test")
    parser.add_argument(
        "--patience",
        type=float,
        default=300,
        help="seconds for all tests; a mutant that they have not killed by then has survived",
    )
    parser.add_argument(
        "--quick", action="store_true", help="without the tests that interpret kernels"
    )
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, read and added to")
    parser.add_argument("--table", type=Path, help="write the page of these results and end")
    options = parser.parse_args()
    if options.table:
        options.table.write_text(table(_read(options.results), explained()))
        return
    # Each child would import these anew. Triton is not among them: it asks for TRITON_INTERPRET.
    for name in ("torch", "numba", "pytest"):
        importlib.import_module(name)

    drawn = chosen(options.count, options.seed, options.modules)
    run(drawn, options.results, options.limit, options.patience, not options.quick)


if __name__ == "__main__":
    main()
