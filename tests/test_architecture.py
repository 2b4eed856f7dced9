"""The architecture page is true: its picture of the imports, its walk and its files."""

import functools
import graphlib
import importlib
import importlib.util
import pkgutil
import re
import sys
from collections import defaultdict
from pathlib import Path

import grimp
import pytest
import torch

from tests._back_end import use_triton
from tests._process import ROOT
from tritonspconv import kernels
from tritonspconv.testing import random_sites

PAGE = (ROOT / "tritonspconv" / "README.md").read_text(encoding="utf-8")
WORKSHOP = {
    "reference", "testing", "points", "models", "bench", "demo", "verify", "cli", "compat",
    "_compat_name", "_self_check", "__main__", "profile", "training", "data",
}  # fmt: skip


def room_of(module: str) -> str | None:
    """Return the room of a module, by its name in the picture; None if it is in no room."""
    package, *rest = module.split(".")
    if not rest or package == "compat":
        room = ".".join([package, *rest[:1]])
        return room if room in ("compat.spconv", "compat.minkowski") else None
    if rest[0] in WORKSHOP:
        return None
    if rest[0] != "kernels":
        return "leaves" if is_leaf(rest[0]) else rest[0]
    if rest[1:] == ["tuning"]:  # the part of the Triton kernels that tuners see
        return None
    if rest[1:2] in (["triton"], ["numba"], ["eager"]):
        return f"kernels.{rest[1]}"
    return "kernels: faces" if rest[1:] and rest[1] in faces() else "kernels: forms"


@functools.cache
def imports() -> grimp.ImportGraph:
    """Return the modules that each module imports; imports for types alone do not count."""
    return grimp.build_graph("tritonspconv", "compat", exclude_type_checking_imports=True)


def is_leaf(name: str) -> bool:
    """Return whether ``tritonspconv.<name>`` is a single module that imports only leaves."""
    if not (ROOT / "tritonspconv" / f"{name}.py").exists():
        return False
    targets = imports().find_modules_directly_imported_by(f"tritonspconv.{name}")
    return all(is_leaf(target.partition(".")[2]) for target in targets)


@functools.cache
def faces() -> set[str]:
    """Return the names of the modules that pick a back end."""
    names = [info.name for info in pkgutil.iter_modules(kernels.__path__)]
    return {
        name
        for name in names
        if name not in ("triton", "numba", "eager")
        and hasattr(importlib.import_module(f"tritonspconv.kernels.{name}"), "_back_end")
    }


def drawn() -> dict[str, set[str]]:
    """Return the arrows of the picture."""
    (picture,) = re.findall(r"```mermaid\ngraph TD\n(.*?)```", PAGE, re.DOTALL)
    titles = dict(re.findall(r"(\w+)\[([^\]]+)\]", picture))
    arrows = defaultdict(set)
    for line in re.sub(r"\[[^\]]+\]", "", picture).strip().splitlines():
        start, end = line.split(" --> ")
        arrows[titles.get(start.strip(), start.strip())].add(titles.get(end, end))
    return arrows


def imported() -> dict[str, set[str]]:
    """Return which rooms each room imports."""
    rooms = defaultdict(set)
    for module in imports().modules:
        for target in imports().find_modules_directly_imported_by(module):
            start, end = room_of(module), room_of(target)
            if start and end and start != end:
                rooms[start].add(end)
    return rooms


def reachable(arrows: dict[str, set[str]], start: str) -> set[str]:
    """Return every room that arrows lead to."""
    seen, todo = set(), [start]
    while todo:
        for room in arrows.get(todo.pop(), ()):
            if room not in seen:
                seen.add(room)
                todo.append(room)
    return seen


def test_the_picture_is_that_of_the_imports():
    arrows, rooms = drawn(), imported()
    for room, targets in rooms.items():
        astray = targets - reachable(arrows, room)
        assert not astray, f"the architecture page has no arrows from {room} to {astray}"
    for room, targets in arrows.items():
        unused = targets - rooms[room]
        assert not unused, f"the architecture page has arrows from {room} to {unused}: no imports"


def test_no_room_leads_back_to_itself():
    arrows = drawn()
    assert not [room for room in arrows if room in reachable(arrows, room)]


def test_no_imports_lead_in_a_circle():
    """This holds for imports inside functions too."""
    graph = imports()
    graphlib.TopologicalSorter(
        {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    ).prepare()


def test_every_room_of_the_picture_is_described():
    arrows = drawn()
    rooms = {*arrows, *(room for targets in arrows.values() for room in targets)}
    described = set()
    for line in PAGE.partition("| room |")[2].partition("\n\n")[0].splitlines():
        cell = line.split("|")[1] if line.count("|") > 1 else ""
        described |= {name.replace("`", "").strip() for name in cell.split(", ")}
    assert rooms <= described


def walked(title: str) -> list[tuple[str, str]]:
    """Return (function, file) of each line of one of the page's walks."""
    rows = PAGE.partition(f"| {title} | in |")[2].partition("\n\n")[0]
    return re.findall(r"^\| `([\w.]+)` \| `([\w/.]+)` \|", rows, re.MULTILINE)


def traced(run) -> list[tuple[str, str]]:
    """Return (function, file) of every call of our code during ``run``, in order."""
    calls = []

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            calls.append((frame.f_code.co_name, str(path.relative_to(ROOT))))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def callers() -> list[tuple[str, str]]:
    """Return (function, file) of every function of the package that is on the stack."""
    found, frame = [], sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if any(path.is_relative_to(ROOT / name) for name in ("tritonspconv", "compat")):
            found.append((frame.f_code.co_name, str(path.relative_to(ROOT))))
        frame = frame.f_back
    return found


def check_walk(title: str, calls: list[tuple[str, str]]) -> None:
    """Check that a run calls the functions of a walk, in their order."""
    place = 0
    for function, file in walked(title):
        name = function.rpartition(".")[2]
        if name.endswith("_kernel"):  # runs on the GPU
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
            continue
        assert (name, file) in calls[place:], f"{title}: the run does not pass {function} in {file}"
        place = calls.index((name, file), place) + 1


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_layer_walks_as_the_page_says(monkeypatch):
    """The walk runs on a CPU, without the launches themselves."""
    spconv = importlib.import_module("compat.spconv.pytorch")
    launch = importlib.import_module("tritonspconv.kernels.triton._launch")
    stacks = []
    monkeypatch.setattr(
        launch.BoundKernel, "_launch_by_triton", lambda *_: stacks.append(callers())
    )
    use_triton(monkeypatch, "sites", "neighbor_table", "pairs", "gather_gemm")
    use_triton(monkeypatch, "conv_grads", "order_columns")
    sites = random_sites(20, extent=8)
    layer = spconv.SubMConv3d(4, 6, 3, indice_key="level")
    feats = torch.randn(20, 4, requires_grad=True)
    grid = sites.grid
    x = spconv.SparseConvTensor(feats, sites.coords, list(grid.shape), grid.batch_size)
    first = layer(x)
    first.features.sum().backward()
    x.indice_dict = first.indice_dict
    stacks.clear()
    out = []
    check_walk("forward", traced(lambda: out.append(layer(x))))
    check_walk("backward", traced(lambda: out[0].features.sum().backward()))
    assert len(walked("forward")) > 8
    assert len(walked("backward")) > 4
    # No function on the way to a launch is missing from the page.
    stations = {
        (function.rpartition(".")[2], file)
        for title in ("forward", "backward")
        for function, file in walked(title)
    }
    assert len(stacks) == 4  # the convolution, two launches for the weight, one for the features
    assert {call for stack in stacks for call in stack} <= stations


def test_files_that_the_page_names_exist():
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|sh))`", PAGE))
    files = [
        f"/{path.relative_to(ROOT)}"
        for folder in ("tritonspconv", "compat", "scripts", "tests")
        for path in (ROOT / folder).rglob("*.*")
    ]
    assert len(named) > 10
    assert not {name for name in named if not any(file.endswith(f"/{name}") for file in files)}
