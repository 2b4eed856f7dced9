"""The comparison finds every kind of difference, and finds none where there is none."""

import os
import sys

import pytest
import torch

from tests.parity import golden, report, suite
from tests.parity.case import IN_THE_CASE, Case, Quirk, Recording, Run, canonical
from tests.parity.judge import Recordings, Verdict, compare
from tests.parity.originals import ORIGINALS, Original
from tests.parity.side import ROOT, Job, environment, jobs_of, run, run_processes

COORDS = torch.tensor([[0, 1, 2], [0, 0, 5], [1, 0, 0]], dtype=torch.int32)
FEATS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def recording(coords=COORDS, feats=FEATS, **changes) -> Recording:
    made = Recording({"out": feats, "grad weight": feats.sum(0)}, {"out": coords}, ["out"])
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def judged(adapter: Recording, original: Recording | None = None, **case):
    original = original or recording()
    truth = recording(feats=FEATS.double())
    runs = Recordings(original, adapter, truth, [recording()])
    return compare(Case("case", print, **case), "float32", "cpu", runs)


def test_equal_recordings_are_equal():
    result = judged(recording())
    assert result.verdict is Verdict.EQUAL
    assert result.same_sites
    assert result.same_order
    assert [value.name for value in result.values] == ["out", "grad weight"]


def test_rows_are_compared_in_canonical_order():
    other = torch.tensor([2, 0, 1])
    moved = recording(COORDS[other], FEATS[other])
    assert judged(moved).problems == {"out": "the rows must keep their order"}
    free = recording(kept=[])
    result = judged(moved, free)
    assert result.verdict is Verdict.EQUAL
    assert result.same_order is False


def test_canonical_order_is_by_batch_then_coordinates():
    assert canonical(COORDS).tolist() == [1, 0, 2]
    assert canonical(COORDS[[0, 0, 1]]).tolist() == [2, 0, 1]


def test_tolerance_is_that_of_plain_arithmetic():
    eps = torch.finfo(torch.float32).eps
    assert judged(recording(feats=FEATS * (1 + eps))).verdict is Verdict.CLOSE
    result = judged(recording(feats=FEATS * (1 + 4 * eps)))
    assert result.verdict is Verdict.DIFFERENT
    assert "times the tolerance" in result.problems["out"]
    assert judged(recording(feats=FEATS * (1 + eps)), exact=True).verdict is Verdict.DIFFERENT
    assert judged(recording(feats=FEATS * torch.nan)).verdict is Verdict.DIFFERENT


def test_both_libraries_must_keep_the_tolerance():
    wrong = recording(feats=FEATS + 1)
    assert judged(recording(), wrong).verdict is Verdict.DIFFERENT
    assert judged(wrong, wrong).verdict is Verdict.DIFFERENT


@pytest.mark.parametrize(
    ("changes", "name", "problem"),
    [
        ({"feats": FEATS.half()}, "out dtype", "must be float32; got float16"),
        ({"feats": FEATS[:, :1]}, "out shape", "must be [3, 2]; got [3, 1]"),
        ({"coords": COORDS + 1}, "out", "sites differ"),
        ({"coords": COORDS[:2], "feats": FEATS[:2]}, "out", "differ in number"),
        ({"facts": {"shape": [1]}}, "shape", "only the adapter"),
        ({"tensors": {"out": FEATS}}, "grad weight shape", "only the original"),
        ({"error": "ValueError: no"}, "adapter error", "ValueError: no"),
    ],
    ids=["dtype", "shape", "sites", "rows", "fact", "absent", "error"],
)
def test_other_differences_are_problems(changes, name, problem):
    result = judged(recording(**changes))
    assert result.verdict is Verdict.DIFFERENT
    assert problem in result.problems[name]


def test_a_quirk_explains_what_it_covers():
    wrong = recording(feats=FEATS + 1)
    covered = Quirk("a rule", ("out", "grad weight"))
    result = judged(wrong, quirks=(covered,))
    assert result.verdict is Verdict.EXPLAINED
    assert result.quirks == ["a rule"]
    assert judged(wrong, quirks=(Quirk("a rule", ("out",)),)).verdict is Verdict.DIFFERENT
    elsewhere = Quirk("a rule", ("out", "grad weight"), targets=("cuda",))
    assert judged(wrong, quirks=(elsewhere,)).verdict is Verdict.DIFFERENT


def test_a_failing_original_is_reported():
    failed = Recording(error="KeyError: bfloat16")
    assert judged(recording(), failed).verdict is Verdict.DIFFERENT
    quirk = Quirk("a rule", ("original error",))
    assert judged(recording(), failed, quirks=(quirk,)).verdict is Verdict.EXPLAINED
    assert judged(failed, failed, quirks=(quirk,)).verdict is Verdict.DIFFERENT
    assert judged(failed, quirks=(quirk,)).verdict is Verdict.DIFFERENT


def test_refusals_are_mutual():
    failed = Recording(error="ValueError: no")
    assert judged(failed, failed, refuses=True).verdict is Verdict.EQUAL
    assert judged(failed, failed).verdict is Verdict.DIFFERENT
    assert judged(failed, refuses=True).verdict is Verdict.DIFFERENT
    assert judged(recording(), refuses=True).verdict is Verdict.DIFFERENT
    mistaken = Recording(error=f"NameError at cases.py:3{IN_THE_CASE}: name 'torch'")
    assert judged(failed, mistaken, refuses=True).verdict is Verdict.DIFFERENT


def test_the_worst_plain_run_sets_the_limit():
    eps = torch.finfo(torch.float32).eps
    rounded, worse = recording(feats=FEATS * (1 + 6 * eps)), recording(feats=FEATS * (1 + 4 * eps))
    runs = Recordings(recording(), rounded, recording(feats=FEATS.double()), [recording()])
    case = Case("case", print)
    assert compare(case, "float32", "cpu", runs).verdict is Verdict.DIFFERENT
    runs.plain = [recording(), worse]
    assert compare(case, "float32", "cpu", runs).verdict is Verdict.CLOSE


def test_nudged_features_move_by_roundings():
    plain, nudged = state(), state()
    nudged.nudge = 1
    ratio = nudged.feats(50).double() / plain.values("feats", 50).double() - 1
    assert (ratio.abs() / torch.finfo(torch.float32).eps).round().unique().tolist() == [16]


def test_every_quirk_of_a_case_is_a_line_of_the_adapters_list():
    for original in ORIGINALS.values():
        page = (ROOT / original.adapter.replace(".", "/") / "QUIRKS.md").read_text()
        rules = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
        for case in original.cases.values():
            for quirk in case.quirks:
                found = [rule for rule in rules if rule.startswith(quirk.rule)]
                assert len(found) == 1, (case.name, quirk.rule)


def state(name="case", precision="float32", device="cpu") -> Run:
    return Run(name, "compat.spconv", False, "cpu", torch.device(device), precision)


def test_inputs_depend_on_names_alone():
    values = state().values("feats", 2, 3)
    assert values.tolist() == [
        [-0.2333984375, 0.8330078125, -0.9921875],
        [0.3857421875, 0.958984375, 0.7490234375],
    ]
    assert torch.equal(values.half(), state(precision="float16").values("feats", 2, 3))
    assert not torch.equal(values, state().values("other", 2, 3))
    assert not torch.equal(values, state("another").values("feats", 2, 3))
    assert state().sites([4, 5], 3).tolist() == [[1, 2, 0], [0, 3, 2], [1, 2, 4]]
    assert len(state().sites([4, 5], 40).unique(dim=0)) == 40


# Cases that run in a process of their own must be importable: this module is their `Original`.


def _dies(run: Run) -> None:
    if run.original:
        os._exit(3)


def _works(run: Run) -> None:
    run.tensor("out", run.values("out", 3))


CASES = [Case("works", _works), Case("dies", _dies), Case("works-too", _works)]


def test_what_a_case_raises_is_recorded():
    def fails(run: Run) -> None:
        raise ValueError("this\nand that")

    original = Original("spconv", "compat.spconv", (), (), lambda target: None, bool)
    found = run(original, Case("fails", fails), "cpu", Job("fails", False, "float32", "cpu"))
    assert found.error is not None
    assert found.error.startswith("ValueError at test_framework.py:")
    assert IN_THE_CASE in found.error
    assert found.error.endswith("this and that")


def test_a_crash_loses_one_job(tmp_path):
    jobs = [Job(case.name, True, "float32", "cpu") for case in CASES]
    original = Original("math", "math", (), ("tests.parity.test_framework",), print, bool)
    done = run_processes(original, "cpu", jobs, tmp_path, sys.executable)
    assert [done[job].error for job in jobs] == [None, "the process died with status 3", None]


def test_an_absent_original_is_an_error_at_once():
    absent = ORIGINALS["spconv"] if ORIGINALS["spconv"].absence("cuda") else None
    if absent is None:
        pytest.skip("spconv runs on this machine's GPU")
    with pytest.raises(RuntimeError, match="cannot run spconv on cuda: RuntimeError: the original"):
        suite.live(absent, [], "cuda", sys.executable)


def test_processes_keep_the_callers_python_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert environment()["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/elsewhere"]
    monkeypatch.delenv("PYTHONPATH")
    assert environment()["PYTHONPATH"] == str(ROOT)


def test_golden_files_keep_everything(tmp_path):
    made = recording(facts={"shape": [1, 2]}, error=None)
    half = Recording({"out": FEATS.half(), "bits": FEATS.bfloat16()}, error="KeyError: x")
    jobs = {
        Job("one", True, "float32", "cuda"): made,
        Job("one", True, "float16", "cuda"): half,
    }
    golden.save(tmp_path / "file.npz", {"device": "some GPU"}, jobs)
    setting, found = golden.load(tmp_path / "file.npz")
    assert setting == {"device": "some GPU"}
    assert found["one", "float32"].facts == made.facts
    assert found["one", "float32"].kept == ["out"]
    assert torch.equal(found["one", "float32"].coords["out"], COORDS)
    assert found["one", "float16"].error == "KeyError: x"
    assert found["one", "float16"].tensors["out"].dtype == torch.float16
    assert torch.equal(found["one", "float16"].tensors["bits"], FEATS.bfloat16())


def test_reports_name_every_difference():
    wrong = recording(feats=FEATS + 1)
    results = [
        judged(recording()),
        judged(wrong),
        judged(wrong, quirks=(Quirk("a rule", ("out", "grad weight")),)),
    ]
    assert "3 comparisons: 1 equal, 0 within tolerance, 1 explained, 1 DIFFERENT" in report.text(
        results
    )
    page = report.markdown("Title", {"torch": "2"}, results)
    assert page.startswith("# Title\n\n- torch: 2\n")
    assert "**unexplained**" in page
    assert "| a rule |" in page
    assert report.data({}, results)["verdicts"] == {"equal": 1, "DIFFERENT": 1, "explained": 1}


def test_jobs_are_shared_between_dtypes():
    case = Case("case", print)
    cpu, cuda = jobs_of(case, "cpu"), jobs_of(case, "cuda")
    assert cpu["float64"]["truth"] == cpu["float64"]["original"] == cpu["float32"]["truth"]
    assert cpu["float64"]["plain0"] == cpu["float32"]["original"]
    assert not cuda["float16"]["truth"].original
    assert cuda["float16"]["plain0"] == Job("case", False, "float16", "cpu")
    assert jobs_of(case, "cuda", golden=True)["float16"]["adapter"].device == "cpu"
    assert not jobs_of(case, "cpu", golden=True)["float32"]["truth"].original
    exact = jobs_of(Case("case", print, {"cpu": ("float32",)}, exact=True), "cpu")["float32"]
    assert set(exact) == {"original", "adapter"}
    assert suite.recordings(exact, dict.fromkeys(exact.values(), Recording())).truth is None
    nudged = jobs_of(Case("case", print, nudges=2), "cpu")["float32"]
    assert [nudged[f"plain{n}"].nudge for n in range(3)] == [0, 1, 2]
