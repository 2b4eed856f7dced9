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

    Pointers become addresses. Small networks spend much of their time here. This function writes
    and compiles code for the arguments, which takes a third of the time of a loop over them.

    Args:
        args: The arguments.
        is_plain: One flag for each argument. True: Triton does not specialise on the argument.
        types: The arguments' types, for the values that :mod:`_torch_launcher` takes: without
            constants, with tuples opened. None: return the values that Triton's launcher takes.
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
        elif type(arg) is float:  # Triton does not specialise on the value
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
    """Yield arguments and their types, with tuples opened and without constants."""
    for name, kind in zip(names, types, strict=False):
        if type(kind) is tuple:
            yield from leaves([f"{name}[{place}]" for place in range(len(kind))], kind)
        elif kind != "constexpr":
            yield name, kind


@functools.lru_cache(maxsize=4096, typed=True)
def _kind(arg: Any) -> Any:
    """Return the kind of a number or tuple: arguments of one kind share a compiled kernel.

    Triton specialises on 1, on multiples of 16 and on numbers beyond 32 bits, inside tuples too,
    whether or not the tuple is in ``do_not_specialize``.
    """
    if type(arg) is tuple:
        return tuple(map(_kind, arg))
    if type(arg) is int:
        return 1 if arg == 1 else (arg % 16 == 0, -_INT32 <= arg < _INT32)
    return arg
