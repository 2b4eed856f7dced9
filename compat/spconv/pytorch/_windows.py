"""Windows of layers: output sizes, and the engine's geometry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

from compat.spconv.pytorch._errors import SpconvError
from tritonspconv.geometry import ConvGeometry


def get_conv_output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Return ``(n + 2p - d(k-1) - 1) // s + 1`` per axis, and 1 where ``kernel_size`` is -1.

    ``input_size`` says how many axes there are; entries of the others beyond that are ignored.

    Raises:
        SpconvError: A sequence is shorter than ``input_size``, or a stride is 0.
    """
    kernel_size, stride, padding, dilation = _axes_of(
        input_size, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation
    )
    axes = zip(input_size, kernel_size, stride, padding, dilation, strict=True)
    return [1 if k == -1 else (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]


def get_deconv_output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> list[int]:
    """Return ``(n-1)s - 2p + k + output_padding`` per axis; dilation has no effect.

    ``input_size`` says how many axes there are; entries of the others beyond that are ignored.

    Raises:
        SpconvError: A sequence is shorter than ``input_size``, or a kernel size is -1.
    """
    kernel_size, stride, padding, output_padding = _axes_of(
        input_size, kernel_size=kernel_size, stride=stride, padding=padding,
        output_padding=output_padding,
    )  # fmt: skip
    if any(k == -1 for k in kernel_size):
        raise SpconvError(f"a transposed kernel_size must be at least 1; got {kernel_size}.")
    axes = zip(input_size, kernel_size, stride, padding, output_padding, strict=True)
    return [(n - 1) * s - 2 * p + k + e for n, k, s, p, e in axes]


def output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    *,
    transposed: bool,
) -> tuple[int, ...]:
    """Return the extents of a strided layer's outputs, which may be less than 1.

    Raises:
        SpconvError: As :func:`get_conv_output_size` and :func:`get_deconv_output_size`.
    """
    sizes = kernel_size, stride, padding, dilation
    if transposed:
        return tuple(get_deconv_output_size(input_size, *sizes, output_padding))
    return tuple(get_conv_output_size(input_size, *sizes))


def _axes_of(input_size: Sequence[int], **others: Sequence[int]) -> list[Sequence[int]]:
    """Return as many entries of the others as ``input_size`` has."""
    ndim = len(input_size)
    for name, values in others.items():
        if len(values) < ndim:
            raise SpconvError(
                f"{name} must have an entry for each of {ndim} axes; got {list(values)}."
            )
        if name == "stride" and any(step == 0 for step in values[:ndim]):
            raise SpconvError(f"stride must not be 0; got {list(values)}.")
    return [values[:ndim] for values in others.values()]


def window(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    *,
    subm: bool,
    transposed: bool,
) -> ConvGeometry:
    """Return a layer's geometry.

    Raises:
        SpconvError: A number is out of range, or a submanifold window has an even size.
    """
    sizes = tuple(kernel_size), tuple(dilation)
    if subm:
        return _submanifold_window(*sizes)
    extra = tuple(output_padding) if transposed else ()
    return _strided_window(*sizes, tuple(stride), tuple(padding), extra, transposed)


# The result is cached: layers ask at every call, because downstream code assigns to attributes.
@lru_cache(maxsize=1024)
def _submanifold_window(kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> ConvGeometry:
    if any(size % 2 == 0 for size in kernel_size):
        raise _even_submanifold(kernel_size)
    with _as_spconv_error():
        return ConvGeometry.submanifold(kernel_size, dilation)


@lru_cache(maxsize=1024)
def _strided_window(
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    transposed: bool,
) -> ConvGeometry:
    with _as_spconv_error():
        return ConvGeometry(
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            transposed=transposed,
            output_padding=output_padding,
        )


@contextmanager
def _as_spconv_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SpconvError(str(error)) from error


def _even_submanifold(kernel_size: Sequence[int]) -> SpconvError:
    """Return the error for a submanifold window without a centre."""
    return SpconvError(
        f"a submanifold convolution needs odd kernel sizes; got {list(kernel_size)}. Use "
        "SparseConv with padding, or an odd kernel."
    )
