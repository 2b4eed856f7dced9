"""The tolerance rule: a result may have twice the error of plain arithmetic in its dtype."""

from collections.abc import Callable

import torch
from torch import Tensor


def tolerance(reference: Tensor, dtype: torch.dtype, eager: Tensor | None = None) -> float:
    """Return the largest error allowed against a float64 reference.

    ``2 * (max|eager - reference| + eps(dtype) * max|reference|)``: the error that the same formula
    has in eager ``dtype`` arithmetic, plus one rounding of the largest value, doubled. The float64
    reference cannot tell how wrong a float64 result may be; 32 roundings are allowed it, for sums
    in another order.

    Args:
        reference: The float64 result.
        dtype: The dtype the judged result was computed in.
        eager: The same computation done by plain torch in ``dtype``. Without it only the rounding
            of the result itself is allowed, which suits operations that do not add.
    """
    if reference.numel() == 0:
        return 0.0
    reference = reference.detach().double().cpu()
    roundings = 32 if dtype == torch.float64 else 1
    rounding = roundings * torch.finfo(dtype).eps * reference.abs().max().item()
    error = 0.0
    if eager is not None:
        error = (eager.detach().double().cpu() - reference).abs().max().item()
    return 2 * (error + rounding)


def assert_close(
    actual: Tensor,
    reference: Tensor,
    dtype: torch.dtype | None = None,
    *,
    eager: Tensor | None = None,
    name: str = "result",
) -> None:
    """Assert that ``actual`` lies within `tolerance` of a float64 ``reference``.

    Args:
        actual: The result to judge, on any device.
        reference: The float64 result.
        dtype: The dtype ``actual`` was computed in. Default: its own.
        eager: The same computation done by plain torch in ``dtype``; see `tolerance`.
        name: The name of ``actual`` in the message.

    Raises:
        AssertionError: Shapes differ, a value is not finite where the reference is, or the error is
            too large. The message names the worst entry.
    """
    if actual.shape != reference.shape:
        raise AssertionError(
            f"{name} must have shape {list(reference.shape)}; got {list(actual.shape)}."
        )
    if actual.numel() == 0:
        return
    dtype = dtype or actual.dtype
    limit = tolerance(reference, dtype, eager)
    ours = actual.detach().double().cpu()
    theirs = reference.detach().double().cpu()
    error = (ours - theirs).abs().nan_to_num(nan=float("inf"))
    worst = int(error.argmax())
    if error.flatten()[worst] <= limit:
        return
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
    wrong = int((error > limit).sum())
    raise AssertionError(
        f"{name}{index} must be {theirs.flatten()[worst]:.9g} in float64; got "
        f"{ours.flatten()[worst]:.9g}: error {error.flatten()[worst]:.3g} exceeds {limit:.3g} "
        f"({dtype}); {wrong} of {error.numel()} entries do."
    )


def assert_matches(
    actual: Tensor,
    formula: Callable[..., Tensor],
    *inputs: Tensor | None,
    dtype: torch.dtype | None = None,
    name: str = "result",
) -> None:
    """Assert that ``actual`` is ``formula(*inputs)``, by `assert_close`.

    Args:
        actual: The result to judge.
        formula: Plain torch on CPU tensors; called once with float64 inputs for the truth and once
            with ``dtype`` inputs for the error that the dtype brings.
        inputs: Float tensors of any device and dtype, or None.
        dtype: The dtype ``actual`` was computed in. Default: its own.
        name: The name of ``actual`` in the message.
    """
    dtype = dtype or actual.dtype
    truth, eager = (
        formula(*(x if x is None else x.detach().cpu().to(d) for x in inputs))
        for d in (torch.float64, dtype)
    )
    assert_close(actual, truth, dtype, eager=eager, name=name)
