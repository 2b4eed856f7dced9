"""Batch norm of training as one operator of a graph.

The operator runs the passes that eager mode runs, forward and backward: torch's on a CPU, and the
Triton kernels on a GPU. It also clamps: the gradient of its ReLU reads the output, which the next
convolution keeps anyway. For a ReLU of its own, inductor often writes a mask of bools. Its C++ code
took 4.6 ms to write the mask of [3000, 64], where eager mode takes 0.16 ms (torch 2.13, AVX2). On a
GPU inductor of torch 2.11 sums over rows in one program for a few channels if it does not know how
many rows there are; 21 norms then took 8 ms where the convolutions take 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.batch_norm import batch_norm, batch_norm_grad, fuses_training
from tritonspconv.kernels.channel_norm import TrainingNorm
from tritonspconv.opaque_types import AVAILABLE
from tritonspconv.ops.batch_norm import takes_training_norm
from tritonspconv.ops.registered import LIBRARY, refuse_second_order, register_operator


def _forward(
    feats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    if feats.shape[0] == 1:
        raise ValueError(
            f"batch norm: in training each channel needs more than one row; got {list(feats.shape)}"
            ". Call net.eval(), or skip inputs of one site."
        )
    if (
        running_mean is not None
        and running_var is not None
        and _fuses(feats, weight, bias, running_mean, running_var)
    ):
        norm = TrainingNorm(running_mean, running_var, weight, bias, num_batches, momentum, eps)
        return batch_norm(feats.contiguous(), norm, relu)
    if num_batches is not None:
        num_batches.add_(1)
    out, mean, inverse_std = torch.native_batch_norm(
        feats.contiguous(), weight, bias, running_mean, running_var, True, momentum, eps
    )
    return out.relu_() if relu else out, torch.stack([mean, inverse_std])


def _fake_forward(
    feats: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    held = (vector.dtype for vector in (weight, bias, running_mean) if vector is not None)
    dtype = acc_dtype(feats.dtype) if feats.is_cuda else next(held, feats.dtype)
    stats = feats.new_empty(2, feats.shape[1], dtype=dtype)
    return feats.new_empty(feats.shape), stats


def _grads(
    grad: Tensor,
    feats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    clamped: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if _fuses(feats, weight, bias, stats):
        relu = clamped is not None
        return batch_norm_grad(
            grad.contiguous(), feats.contiguous(), stats, weight, bias, relu
        )[:3]  # fmt: skip
    mean, inverse_std = stats.unbind()
    if clamped is not None:
        grad = torch.ops.aten.threshold_backward(grad, clamped, 0)
    return torch.ops.aten.native_batch_norm_backward(
        grad.contiguous(), feats.contiguous(), weight, None, None, mean, inverse_std, True, eps,
        [True, True, True],
    )  # fmt: skip


def _fake_grads(
    grad: Tensor,
    feats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return feats.new_empty(feats.shape), torch.empty_like(stats[0]), torch.empty_like(stats[1])


def _fuses(feats: Tensor, *vectors: Tensor | None) -> bool:
    """Return whether the kernels take a norm of ``feats`` by these vectors."""
    return (
        fuses_training(feats.device)
        and takes_training_norm(feats, None)
        and all(
            vector is None or (vector.dtype == torch.float32 and vector.is_contiguous())
            for vector in vectors
        )
    )


class _BatchNorm(torch.autograd.Function):
    """The autograd node of the operator."""

    @staticmethod
    def forward(
        ctx: Any, feats: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        out, stats = torch.ops.tritonspconv.batch_norm_forward(feats, weight, bias, *rest)
        *_, ctx.eps, relu = rest
        ctx.save_for_backward(feats, weight, bias, stats, out if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        grads = torch.ops.tritonspconv.batch_norm_grads(grad, *ctx.saved_tensors, ctx.eps)
        needed = zip(grads, ctx.needs_input_grad, strict=False)
        return (*(found if needs else None for found, needs in needed), *[None] * 6)


def _register() -> None:
    operands = (
        "Tensor feats, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
        "Tensor(b!)? running_var, Tensor(c!)? num_batches, float momentum, float eps, bool relu"
    )
    register_operator(
        "batch_norm_forward", f"({operands}) -> (Tensor, Tensor)", _forward, _fake_forward
    )
    register_operator(
        "batch_norm_grads",
        "(Tensor grad, Tensor feats, Tensor? weight, Tensor? bias, Tensor stats, Tensor? clamped, "
        "float eps) -> (Tensor, Tensor, Tensor)",
        _grads,
        _fake_grads,
    )
    LIBRARY.define(f"batch_norm({operands}) -> Tensor")
    LIBRARY.impl("batch_norm", lambda *args: _BatchNorm.apply(*args), "CompositeImplicitAutograd")


if AVAILABLE:
    _register()
