"""Change one operator, constant or condition at a time, and see whether the tests notice.

    python scripts/tools/mutate.py --count 150 --results mutants.jsonl      # hours on two cores
    python scripts/tools/mutate.py --results mutants.jsonl --table docs/mutants.md

Each mutant runs in a process of its own, on a copy of the checkout, against its module's tests.
Start an interrupted run again, and it continues. ``scripts/tools/survivors.toml`` explains
survivors.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
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
from typing import NamedTuple

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[2]
EXPLANATIONS = Path(__file__).with_name("survivors.toml")

# Folder or file -> tests that would notice a change, quick ones first. Tests after "interpreter"
# run with TRITON_INTERPRET=1. A module uses the longest name that fits its path; "{stem}" stands
# for the name of the module.
_MAPS = "tests/kernel_map/test_kernel_map.py"
_BACK_ENDS = "interpreter tests/test_back_ends.py"
_LAUNCH = "tests/kernels/test_launch_arguments.py"
TESTS = {
    "tritonspconv/geometry.py": f"tests/test_geometry.py {_MAPS}",
    "tritonspconv/coords": f"tests/coords {_MAPS} interpreter tests/coords",
    "tritonspconv/kernel_map": f"tests/kernel_map/test_from_pairs.py {_MAPS} {_BACK_ENDS} "
    "tests/kernel_map/test_ordered_tables.py",
    "tritonspconv/kernels": f"{_MAPS} tests/ops/test_conv.py tests/ops/test_{{stem}}.py "
    f"{_BACK_ENDS}",
    "tritonspconv/kernels/eager": f"tests/ops/test_conv.py {_MAPS} tests/ops/test_{{stem}}.py "
    "tests/coords interpreter "
    "tests/kernels/test_{stem}.py tests/kernels/test_pair_panels.py",
    "tritonspconv/kernels/eager/gather_gemm.py": "tests/ops/test_conv.py",
    "tritonspconv/kernels/eager/weight_grad.py": "tests/ops/test_conv.py interpreter "
    "tests/kernels/test_weight_grad.py",
    "tritonspconv/kernels/eager/segment_reduce.py": "tests/ops/test_global_pool.py "
    "tests/ops/test_voxelize.py interpreter tests/kernels/test_segment_reduce.py",
    "tritonspconv/kernels/triton": "interpreter tests/kernels/test_{stem}.py "
    "tests/test_back_ends.py",
    "tritonspconv/kernels/triton/_launch.py": _LAUNCH,
    "tritonspconv/kernels/triton/_arguments.py": _LAUNCH,
    "tritonspconv/kernels/triton/_torch_launcher.py": _LAUNCH,
    "tritonspconv/kernels/triton/_versions.py": _LAUNCH,
    "tritonspconv/kernels/triton/_column_order.py": "interpreter "
    "tests/kernels/test_column_order.py tests/kernel_map/test_ordered_tables.py",
    "tritonspconv/kernels/triton/_index.py": "interpreter tests/kernels/test_sites.py "
    "tests/kernels/test_neighbor_table.py",
    "tritonspconv/kernels/triton/_grid.py": "interpreter tests/kernels/test_sites.py "
    "tests/kernels/test_neighbor_table.py tests/kernels/test_window_taps.py",
    "tritonspconv/kernels/triton/_scratch_table.py": "interpreter "
    "tests/kernels/test_scatter_table.py tests/test_back_ends.py",
    "tritonspconv/kernels/triton/configs.py": "tests/kernels/test_compile_targets.py interpreter "
    "tests/kernels/test_tuned_tiles.py tests/kernels/test_gather_gemm.py",
    "tritonspconv/ops": f"tests/ops/test_{{stem}}.py tests/nn {_BACK_ENDS}",
    "tritonspconv/ops/conv.py": f"tests/ops/test_conv.py {_BACK_ENDS}",
    "tritonspconv/nn": "tests/nn tests/compat/spconv/test_fused_layers.py",
    "tritonspconv/sparse_tensor.py": "tests/test_sparse_tensor.py tests/nn",
    "tritonspconv/reference.py": "tests/test_reference.py tests/test_geometry.py",
    "tritonspconv/testing": "tests/test_testing.py tests/test_rooms.py",
    "compat/_install.py": "tests/compat/test_install.py tests/compat/test_install_minkowski.py",
    "compat/spconv": "tests/compat/spconv tests/parity/test_spconv_surface.py",
    "compat/minkowski": "tests/compat/minkowski tests/nn/test_fuse.py",
}

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


# No test judges mutants of error messages, of the texts of objects, of types and of imports:
# these compute nothing.
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


def tests_of(path: str) -> list[tuple[bool, list[str]]]:
    """Return the runs of pytest for a module: whether kernels are interpreted, and what to run."""
    fitting = [name for name in TESTS if path == name or path.startswith(f"{name}/")]
    if not fitting:
        return []
    plain, _, interpreted = TESTS[max(fitting, key=len)].partition("interpreter")
    stem = Path(path).stem.lstrip("_")
    runs = []
    for is_interpreted, names in ((False, plain), (True, interpreted)):
        found = [name.format(stem=stem) for name in names.split()]
        found = [name for name in found if (ROOT / name).exists()]
        if found:
            runs.append((is_interpreted, found))
    return runs


def chosen(count: int, seed: int, pattern: str) -> list[Mutant]:
    """Draw mutants of every module that has tests.

    A module gets a share in proportion to the square root of the number of its mutants.
    """
    by_module = {}
    for path in sorted(ROOT.glob(pattern)):
        name = str(path.relative_to(ROOT))
        if tests_of(name) and (found := mutants_of(name, path.read_text())):
            by_module[name] = found
    total = sum(len(found) ** 0.5 for found in by_module.values())
    drawn = []
    for name, found in by_module.items():
        share = count * len(found) ** 0.5 / total
        wanted = min(max(round(share), 1), len(found))
        drawn += random.Random(f"{seed} {name}").sample(found, wanted)
    random.Random(seed).shuffle(drawn)
    return drawn[:count]


def run_tests(checkout: Path, runs: list[tuple[bool, list[str]]], timeout: float) -> str:
    """Run the tests of a module in a copy of the checkout; return the fate of its mutant."""
    for is_interpreted, names in runs:
        process = os.fork()
        if process == 0:
            _run_pytest(checkout, is_interpreted, names)
        status = _wait(process, timeout)
        if status != 0:
            return {1: "killed", 5: "survived", None: "timeout"}.get(status, "killed")
    return "survived"


def _run_pytest(checkout: Path, is_interpreted: bool, names: list[str]) -> None:
    """Run pytest in this process, which is a child, and end the process."""
    os.setsid()
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
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", marks, "--hypothesis-seed=1"]
    # Slow tests check large sizes, and no small change concerns these sizes.
    options += ["-k", "not many_rows and not large_windows"]
    os._exit(int(pytest.main([*options, *names])))


def _wait(process: int, timeout: float) -> int | None:
    """Return a child's exit status; None where it takes longer, after its group has ended."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def run(mutants: list[Mutant], results: Path, timeout: float, interprets: bool) -> None:
    """Judge mutants that ``results`` does not hold, and add a line for each."""
    known = {entry["key"] for entry in _read(results)}
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        ignored = shutil.ignore_patterns(".git", "__pycache__", ".venv*", ".hypothesis")
        shutil.copytree(ROOT, checkout, ignore=ignored)
        sound: dict[str, bool] = {}
        for number, mutant in enumerate(mutants):
            if mutant.key in known:
                continue
            runs = [run for run in tests_of(mutant.path) if interprets or not run[0]]
            name = json.dumps(runs)
            if name not in sound:
                sound[name] = run_tests(checkout, runs, 3 * timeout) == "survived"
            if not sound[name]:
                print(f"{mutant.path}: its tests fail, or find nothing, without a change")
                continue
            path, begin = checkout / mutant.path, time.monotonic()
            data = path.read_bytes()
            path.write_bytes(data[: mutant.start] + mutant.text.encode() + data[mutant.stop :])
            fate = run_tests(checkout, runs, timeout)
            path.write_bytes(data)
            entry = {"key": mutant.key, "fate": fate, "line": mutant.line}
            entry["seconds"] = round(time.monotonic() - begin, 1)
            with results.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(f"{number + 1}/{len(mutants)} {fate} in {entry['seconds']} s: {mutant.key}")


def _read(results: Path) -> list[dict]:
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


def table(results: Path) -> str:
    """Return the page that lists the fates of the mutants."""
    entries = _read(results)
    explained = {}
    if EXPLANATIONS.exists():
        explained = tomllib.loads(EXPLANATIONS.read_text())  # pyright: ignore
    fates = Counter(entry["fate"] for entry in entries)
    killed = fates["killed"] + fates["timeout"]
    lines = [
        "# Mutants", "",
        "`scripts/tools/mutate.py` changes one operator, constant or condition of a module and "
        "runs the module's tests. This is its last run; modules without a row were not in it.",
        "",
        f"{len(entries)} mutants: {killed} killed ({100 * killed / max(len(entries), 1):.0f} %), "
        f"{fates['timeout']} of them by the time limit; {fates['survived']} survived.", "",
        "## By module", "", "| module | killed | survived |", "| --- | --- | --- |",
    ]  # fmt: skip
    by_module: dict[str, Counter[bool]] = {}
    for entry in entries:
        path = entry["key"].partition(": ")[0]
        by_module.setdefault(path, Counter())[entry["fate"] == "survived"] += 1
    lines += [f"| `{path}` | {n[False]} | {n[True]} |" for path, n in sorted(by_module.items())]
    lines += ["", "## Survivors", "", "| change | why no test fails |", "| --- | --- |"]
    for entry in sorted(entries, key=lambda entry: entry["key"]):
        if entry["fate"] == "survived":
            path, _, change = entry["key"].partition(": ")
            change = change.replace("|", "\\|").replace(" -> ", "` → `", 1)
            why = explained.get(entry["key"], "not explained yet")
            lines.append(f"| {path}: `{change}` | {why} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run mutants, or write their table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=150, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--modules", default="**/*.py", help="pattern of files, from the root")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one run of pytest")
    parser.add_argument(
        "--quick", action="store_true", help="without the tests that interpret kernels"
    )
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, read and added to")
    parser.add_argument("--table", type=Path, help="write the page of these results and end")
    options = parser.parse_args()
    if options.table:
        options.table.write_text(table(options.results))
        return
    import torch  # noqa: F401 - each child would import it anew

    drawn = chosen(options.count, options.seed, options.modules)
    run(drawn, options.results, options.timeout, not options.quick)


if __name__ == "__main__":
    main()
