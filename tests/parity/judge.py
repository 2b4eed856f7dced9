"""Compare two recordings of a case, and name the verdict.

The rule is that of `tritonspconv.testing`: a result may have twice the error of plain arithmetic in
its dtype. Errors are measured against the truth, a float64 run of the case on a CPU. Plain
arithmetic is a run of the case on a CPU in the dtype that is compared. The original makes both runs
where it runs on a CPU; where the GPU is compared, the adapter makes them. Both libraries must keep
the rule, so a wrong original cannot excuse a wrong adapter. In float64, the error of plain
arithmetic is its error in float32 times the ratio of the two roundings.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.parity.case import IN_THE_CASE, Case, Recording, canonical
from tritonspconv.testing import tolerance


class Verdict(str, enum.Enum):
    """The outcome of a comparison; ``DIFFERENT`` is the only failure."""

    EQUAL = "equal"
    CLOSE = "within tolerance"
    EXPLAINED = "explained"
    DIFFERENT = "DIFFERENT"


@dataclass
class Value:
    """The difference in one tensor.

    Attributes:
        name: Name of the tensor.
        absolute: Largest difference between the libraries.
        relative: ``absolute`` over the original's largest value.
        used: The larger error of the two libraries over the tolerance; above 1 is a problem.
        equal: Whether all bits agree, rows in canonical order.
    """

    name: str
    absolute: float
    relative: float
    used: float
    equal: bool


@dataclass
class Result:
    """The comparison of one case in one dtype; ``problems`` and ``values`` by tensor or fact."""

    case: str
    precision: str
    verdict: Verdict = Verdict.EQUAL
    values: list[Value] = field(default_factory=list)
    same_sites: bool | None = None
    same_order: bool | None = None
    problems: dict[str, str] = field(default_factory=dict)
    quirks: list[str] = field(default_factory=list)
    original_error: str | None = None
    adapter_error: str | None = None


@dataclass
class Recordings:
    """The four runs of a case that a comparison needs.

    Attributes:
        original: The original, in the dtype and on the device that are compared.
        adapter: The adapter, in the same dtype and on the same device.
        truth: A run in float64 on a CPU; None if the case is exact.
        plain: Runs on a CPU in the dtype that is compared, or in float32 if that is float64. The
            run with the largest error sets the tolerance.
    """

    original: Recording
    adapter: Recording
    truth: Recording | None = None
    plain: Sequence[Recording] = ()


def compare(case: Case, precision: str, target: str, runs: Recordings) -> Result:
    """Compare the recordings of the original and the adapter on ``target``."""
    result = Result(case.name, precision)
    result.original_error, result.adapter_error = runs.original.error, runs.adapter.error
    if runs.original.error or runs.adapter.error:
        _judge_errors(case, result)
    elif case.refuses:
        result.problems["original error"] = "both libraries must raise; neither did"
    else:
        _judge_facts(result, runs)
        _judge_sites(result, runs)
        for name in runs.original.tensors:
            judgeable = name in runs.adapter.tensors and name not in result.problems
            if judgeable and f"{name} shape" not in result.problems:
                _judge_values(name, case, result, runs)
    _conclude(case, target, result)
    return result


def _judge_errors(case: Case, result: Result) -> None:
    errors = (result.original_error, result.adapter_error)
    if case.refuses and all(error and IN_THE_CASE not in error for error in errors):
        return
    for side, error in zip(("original", "adapter"), errors, strict=True):
        if error:
            result.problems[f"{side} error"] = error


def _judge_facts(result: Result, runs: Recordings) -> None:
    """Names, shapes, dtypes and plain facts must agree."""
    expected, got = (_described(side) for side in (runs.original, runs.adapter))
    for name in expected | got:
        if name not in got:
            result.problems[name] = "only the original has it"
        elif name not in expected:
            result.problems[name] = "only the adapter has it"
        elif expected[name] != got[name]:
            result.problems[name] = f"must be {expected[name]}; got {got[name]}"


def _described(side: Recording) -> dict[str, Any]:
    facts = dict(side.facts)
    for name, value in side.tensors.items():
        facts[f"{name} shape"] = list(value.shape)
        facts[f"{name} dtype"] = str(value.dtype).removeprefix("torch.")
    return facts


def _judge_sites(result: Result, runs: Recordings) -> None:
    """Sites must be the same; names in ``kept`` must also have their rows in the same order."""
    for name, expected in runs.original.coords.items():
        found = runs.adapter.coords.get(name)
        if found is None or found.shape != expected.shape:
            result.same_sites = False
            result.problems[name] = "the sites differ in number"
            continue
        same = torch.equal(found[canonical(found)], expected[canonical(expected)])
        ordered = torch.equal(found, expected)
        result.same_sites = same and result.same_sites is not False
        result.same_order = ordered and result.same_order is not False
        if not same:
            result.problems[name] = "the sites differ"
        elif name in runs.original.kept and not ordered:
            result.problems[name] = "the rows must keep their order"


def _judge_values(name: str, case: Case, result: Result, runs: Recordings) -> None:
    expected, got = _aligned(name, runs.original), _aligned(name, runs.adapter)
    difference = _largest(got - expected)
    used = 0.0
    if runs.truth is not None:
        for side in (runs.truth, *runs.plain):
            shape = side.tensors[name].shape if name in side.tensors else None
            if shape != expected.shape:
                result.problems[name] = f"no reference: {side.error or f'shape {shape}'}"
                return
        truth = _aligned(name, runs.truth)
        limit = max(_limit(truth, _aligned(name, side), result.precision) for side in runs.plain)
        error = max(_largest(expected - truth), _largest(got - truth))
        used = error / limit if limit else float("inf") if error else 0.0
    largest = _largest(expected)
    value = Value(name, difference, difference / largest if largest else difference, used, False)
    value.equal = torch.equal(expected, got)
    result.values.append(value)
    if case.exact and not value.equal:
        result.problems[name] = f"must have the same bits; differs by {difference:.3g}"
    elif used > 1:
        result.problems[name] = f"error {used:.3g} times the tolerance"


def _aligned(name: str, side: Recording) -> Tensor:
    """Return a tensor in float64, rows in canonical order if it has sites."""
    value = side.tensors[name].double()
    return value[canonical(side.coords[name])] if name in side.coords else value


def _largest(value: Tensor) -> float:
    return value.abs().nan_to_num(nan=float("inf")).max().item() if value.numel() else 0.0


def _limit(truth: Tensor, plain: Tensor, precision: str) -> float:
    dtype = getattr(torch, precision.removeprefix("amp-"))
    if dtype == torch.float64:
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        plain = truth + (plain - truth) * ratio
    return tolerance(truth, dtype, eager=plain)


def _conclude(case: Case, target: str, result: Result) -> None:
    unexplained = set(result.problems)
    for quirk in case.quirks:
        covered = unexplained & set(quirk.covers)
        if covered and target in quirk.targets:
            result.quirks.append(quirk.rule)
            unexplained -= covered
    if unexplained:
        result.verdict = Verdict.DIFFERENT
    elif result.problems:
        result.verdict = Verdict.EXPLAINED
    elif not all(value.equal for value in result.values):
        result.verdict = Verdict.CLOSE
