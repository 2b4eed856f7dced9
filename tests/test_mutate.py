"""scripts/tools: the list of tests fits the tree, and mutate.py tells fates apart."""

import os

import pytest

from scripts.tools import module_tests, mutate

MODULES = [
    path.relative_to(mutate.ROOT).as_posix()
    for package in ("tritonspconv", "compat")
    for path in sorted((mutate.ROOT / package).rglob("*.py"))
]


@pytest.mark.parametrize("name", module_tests.TESTS)
def test_listed_modules_and_their_tests_exist(name):
    paths = [
        path for path in module_tests.TESTS[name].split() if path not in ("interpreter", "plain")
    ]
    for path in [name, *(path for path in paths if "{stem}" not in path)]:
        assert (mutate.ROOT / path).exists(), path


@pytest.mark.parametrize("name", module_tests.LEFT_OUT)
def test_modules_that_are_left_out_exist_and_have_no_tests(name):
    assert (mutate.ROOT / name).exists()
    assert not module_tests.tests_of(name)


def test_every_other_module_with_code_to_change_has_tests():
    for path in MODULES:
        if not module_tests.tests_of(path) and not path.startswith(tuple(module_tests.LEFT_OUT)):
            assert not mutate.mutants_of(path, (mutate.ROOT / path).read_text()), path


def test_tests_run_in_the_listed_order(monkeypatch):
    listed = "interpreter tests/kernels/test_{stem}.py tests/kernels/no_{stem}.py plain tests/nn"
    monkeypatch.setattr(module_tests, "TESTS", {"a": "tests/ops", "a/b": listed})
    assert module_tests.tests_of("a/b/_pool.py") == [
        (True, ["tests/kernels/test_pool.py"]),
        (False, ["tests/nn"]),
    ]
    assert module_tests.tests_of("a/bc.py") == [(False, ["tests/ops"])]
    assert module_tests.tests_of("ab.py") == []


def test_a_longer_draw_continues_a_shorter_one():
    few, more = (mutate.chosen(count, 0, "tritonspconv/kernels/[t-w]*.py") for count in (5, 9))
    assert more[:5] == few
    assert len(set(more)) == 9


def test_mutants_change_one_place():
    found = mutate.mutants_of("m.py", "def f(x):\n    return x + 1 if x < 2 else 0\n")
    assert {mutant.after for mutant in found} == {
        "return (0 if x < 2 else x + 1)",
        "return ((x) - (1)) if x < 2 else 0",
        "return x + 2 if x < 2 else 0",
        "return x + 1 if x <= 2 else 0",
        "return x + 1 if x < 3 else 0",
        "return x + 1 if x < 2 else 1",
    }


def test_the_draw_leaves_out_assertions_of_equal_lengths(tmp_path, monkeypatch):
    file = tmp_path / "m.py"
    file.write_text("def f(x, y):\n    return zip(x, y, strict=True), zip(x, y, strict=False)\n")
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "tests_of", lambda name: [(False, ["test_m.py"])])
    after = [mutant.after for mutant in mutate.chosen(9, 0, "*.py")]
    assert after == ["return zip(x, y, strict=True), zip(x, y, strict=True)"]


def test_the_page_counts_equivalent_survivors_apart():
    fates = ["killed"] * 6 + ["timeout", "survived", "survived", "survived"]
    entries = [{"key": f"a/b.py: x -> {n}", "fate": fate} for n, fate in enumerate(fates)]
    kinds = {"a/b.py: x -> 7": ("equivalent", "It is."), "a/b.py: x -> 8": ("speed", "Slower.")}
    page = mutate.table(entries, kinds)
    assert "10 mutants of 1 modules: 7 killed (70 %), 1 of them by the time limit;" in page
    assert "3 survived. 1 of the survivors are equivalent" in page
    assert "Of the 9 others, 77.8 % are killed." in page
    assert "| `a` | 7 | 3 |" in page
    assert "| a/b.py: `x` → `8` | speed | Slower. |" in page
    assert "| a/b.py: `x` → `9` | - | not explained yet |" in page


def test_every_explained_survivor_changes_a_line_of_the_code():
    pytest.importorskip("tomllib")
    for key in mutate.explained():
        path = key.partition(": ")[0]
        lines = (mutate.ROOT / path).read_text().splitlines()
        assert any(key.startswith(f"{path}: {line.strip()} -> ") for line in lines), key


TEST = """
from module import value

def test_first():
    assert value != 2

def test_second():
    assert value != 3
"""


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        pytest.param(1, mutate.Verdict("survived"), id="survived"),
        pytest.param(2, mutate.Verdict("killed", "test_it.py::test_first"), id="first test"),
        pytest.param(3, mutate.Verdict("killed", "test_it.py::test_second"), id="second test"),
        pytest.param("(", mutate.Verdict("killed", "test_it.py"), id="not even imported"),
    ],
)
def test_a_verdict_names_the_test_that_fails(value, verdict, tmp_path):
    (tmp_path / "module.py").write_text(f"value = {value}\n")
    (tmp_path / "test_it.py").write_text(TEST)
    assert mutate.run_tests(tmp_path, [(False, ["test_it.py"])], limit=60) == verdict


def test_a_test_beyond_the_limit_ends_with_its_process(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_endless():\n    while True: pass\n")
    verdict = mutate.run_tests(tmp_path, [(False, ["test_it.py"])], limit=0)
    assert verdict.fate == "timeout"


def test_tests_that_are_all_left_out_judge_nothing(tmp_path):
    (tmp_path / "test_it.py").write_text("import pytest\n@pytest.mark.slow\ndef test(): 0 / 0\n")
    assert mutate.run_tests(tmp_path, [(False, ["test_it.py"])], 60) == mutate.Verdict("not tested")


def test_a_changed_file_is_put_back_with_its_time_and_its_compiled_code(tmp_path):
    file, compiled = tmp_path / "m.py", tmp_path / "__pycache__/m.nbc"
    file.write_text("x = 1\n")
    os.utime(file, (5, 5))
    compiled.parent.mkdir()
    compiled.write_text("of one")
    with mutate._applied(mutate.Mutant("m.py", 1, "x = 1", "x = 2", 4, 5, "2"), tmp_path):
        assert file.read_text() == "x = 2\n"
        compiled.write_text("of two")
    assert file.read_text() == "x = 1\n"
    assert file.stat().st_mtime == 5
    assert compiled.read_text() == "of one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["__pycache__", "m.py"]
