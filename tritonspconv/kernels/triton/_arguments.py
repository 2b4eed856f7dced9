"""Arguments of a launch: their kind, which decides the compiled kernel, and their values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

_INT32 = 2**31

Take = Callable[..., tuple[Any, ...] | None]


def taker(
    args: tuple[Any, ...], is_plain: tuple[bool, ...], types: Iterable[Any] | None = None
) -> Take:
    """Return ``take`` of :class:`_launch.CompiledKernel` for arguments of the kind of these.

    Pointers become addresses. Small networks spend much of their time here, and a loop over the
    arguments takes three times as long as code written for them, which this writes.

    Args:
        args: The arguments.
        is_plain: Which of them Triton does not specialise on.
        types: The arguments' types, for the values that :mod:`_torch_launcher` takes: without
            constants, tuples opened. ``None`` for those that Triton's launcher takes.
    """
    known: dict[str, Any] = {"kind": _kind}
    addresses, values, tests, aligned = [], [], [], []
    for place, (arg, plain) in enumerate(zip(args, is_plain, strict=False)):
        name = f"a{place}"
        value = name
        if isinstance(arg, Tensor):
            value = f"p{place}"
            addresses.append(f"{value} = {name}.data_ptr()")
            known[f"t{place}"] = arg.dtype
            tests.append(f"{name}.dtype is t{place}")
            if arg.data_ptr() % 16:
                tests.append(f"{value} % 16")
            else:
                aligned.append(value)
        elif arg is None:
            tests.append(f"{name} is None")
        elif type(arg) is float:  # Triton does not specialise on its value
            tests.append(f"type({name}) is float")
        elif plain and type(arg) is int:
            small = f"{-_INT32} <= {name} < {_INT32}"
            tests.append(small if -_INT32 <= arg < _INT32 else f"not {small}")
        else:
            known[f"k{place}"] = _kind(arg)
            tests.append(f"kind({name}) == k{place}")
        values.append(value)
    if types is not None:
        values = [name for name, _ in leaves(values, types)] + ["None", "None"]  # no scratch
    if aligned:
        tests.append(f"({' | '.join(aligned)}) % 16 == 0")
    names = ", ".join(f"a{place}" for place in range(len(args)))
    source = "\n".join([
        f"def take({names}):",
        "    try:",
        *(f"        {line}" for line in addresses),
        f"        return ({', '.join(values)},) if {' and '.join(tests)} else None",
        "    except AttributeError:  # no tensor where one was",
        "        return None",
    ])  # fmt: skip
    exec(source, known)
    take: Take = known["take"]
    return take


def leaves(names: Iterable[str], types: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Yield arguments and their types, tuples opened and constants left out."""
    for name, kind in zip(names, types, strict=False):
        if type(kind) is tuple:
            yield from leaves([f"{name}[{place}]" for place in range(len(kind))], kind)
        elif kind != "constexpr":
            yield name, kind


@functools.lru_cache(maxsize=4096, typed=True)
def _kind(arg: Any) -> Any:
    """Return what Triton specialises a number or tuple on: 1, multiples of 16, 32 bits or more.

    It does so inside tuples too, whether or not the tuple is among ``do_not_specialize``.
    """
    if type(arg) is tuple:
        return tuple(map(_kind, arg))
    if type(arg) is int:
        return 1 if arg == 1 else (arg % 16 == 0, -_INT32 <= arg < _INT32)
    return arg
