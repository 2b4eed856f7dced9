"""The single definition of the relation between input, output and tap.

Every convolution and pooling relates a *fine* and a *coarse* set of sites through one equation::

    fine = stride * coarse - padding + dilation * tap

A forward convolution reads fine sites and writes coarse ones; a transposed convolution swaps the
two roles. Kernel maps, output sites and output shapes all follow from this file. ``tap`` runs over
the kernel window; its row-major index (last axis fastest, as in ``torch.nn`` and spconv, or first
axis fastest, as in MinkowskiEngine) selects the weight matrix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from tritonspconv.arguments import to_ntuple, whole_numbers
from tritonspconv.opaque_types import OpaqueMeta, register_opaque

__all__ = ["ConvGeometry", "IntTuple", "SiteRule", "TapOrder", "to_ntuple"]

# Coordinates are int32, and so are numbers of taps in the kernels.
_MAX_REACH = 2**31 - 1
MAX_TAPS = 2**31 - 1

TapOrder = Literal["last_axis_fastest", "first_axis_fastest"]
SiteRule = Literal["same", "reached", "cells"]

IntTuple = tuple[int, ...]


@register_opaque
@dataclass(frozen=True)
class ConvGeometry(metaclass=OpaqueMeta):
    """Geometry of one convolution or pooling; hashable, and the whole key of the map cache.

    Attributes:
        kernel_size: Window extent in taps, per axis.
        stride: Fine sites per coarse site, per axis.
        padding: Shift of the window against the coarse site, in fine sites, per axis.
        dilation: Fine sites between neighbouring taps, per axis.
        transposed: False: inputs are fine, outputs coarse. True: inputs are coarse, outputs fine.
        sites: The rule for outputs. ``"same"``: the input sites (submanifold, arXiv:1711.10275).
            ``"reached"``: every site with at least one contributing input (dense-convolution rule).
            ``"cells"``: the occupied cells ``floor(fine / stride)`` (MinkowskiEngine's rule).
        tap_order: The axis of the window that runs fastest in the tap index.
        output_padding: Extra fine sites at the upper end of a transposed output, per axis.
        taps: Positions of the taps where they do not fill a box; see :meth:`of_taps`.

    Example:
        >>> ConvGeometry((3,), (2,), (1,), (1,)).offsets  # fine site minus twice the coarse one
        ((-1,), (0,), (1,))
    """

    kernel_size: IntTuple
    stride: IntTuple
    padding: IntTuple
    dilation: IntTuple
    transposed: bool = False
    sites: SiteRule = "reached"
    tap_order: TapOrder = "last_axis_fastest"
    output_padding: IntTuple = ()
    taps: tuple[IntTuple, ...] = ()

    def __post_init__(self) -> None:
        """Check lengths and ranges.

        Raises:
            TypeError: An entry is no whole number.
            ValueError: A field has the wrong length, an entry out of range or an unknown rule, or
                the window is too large.
        """
        for name, least in (
            ("kernel_size", 1),
            ("stride", 1),
            ("dilation", 1),
            ("padding", None),
            ("output_padding", 0),
        ):
            given = getattr(self, name)
            if name == "output_padding" and not given:
                given = (0,) * self.ndim
            values = whole_numbers(name, given)
            if len(values) != self.ndim:
                raise ValueError(
                    f"{name} must have {self.ndim} entries like kernel_size; got {values}."
                )
            if least is not None and min(values) < least:
                raise ValueError(f"{name} must be at least {least} on every axis; got {values}.")
            object.__setattr__(self, name, values)
        for name, rules in (("sites", SiteRule), ("tap_order", TapOrder)):
            if getattr(self, name) not in get_args(rules):
                raise ValueError(
                    f"{name} must be one of {get_args(rules)}; got {getattr(self, name)!r}."
                )
        if self.kernel_volume > MAX_TAPS:
            raise ValueError(
                f"a window must have less than 2**31 taps; got kernel_size={self.kernel_size}."
            )
        for size, step, shift, stride in zip(
            self.kernel_size, self.dilation, self.padding, self.stride, strict=True
        ):
            if max(step * size + abs(shift), stride) > _MAX_REACH:
                raise ValueError(
                    "a window must reach less than 2**31 cells, as coordinates are int32; got "
                    f"{self}."
                )
        if self.sites == "same" and (self.transposed or max(self.stride) > 1):
            raise ValueError(f"sites='same' needs stride 1, not transposed; got {self}.")
        if self.sites == "cells" and self.transposed:
            raise ValueError("sites='cells' is a rule for coarser outputs; got transposed=True.")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # The hash is kept, since every search for a kernel map needs it. A pickled geometry keeps
        # the hash too, so it must not include strings, whose hashes differ between processes.
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation, self.output_padding)
        return hash((sizes, self.transposed, self.taps))

    @classmethod
    def submanifold(
        cls, kernel_size: IntTuple, dilation: IntTuple, tap_order: TapOrder = "last_axis_fastest"
    ) -> ConvGeometry:
        """Return a window centred on every input site: ``in = out + dilation * (tap - k // 2)``."""
        return cls(
            kernel_size=kernel_size,
            stride=(1,) * len(kernel_size),
            padding=tuple(d * (k // 2) for k, d in zip(kernel_size, dilation, strict=True)),
            dilation=dilation,
            sites="same",
            tap_order=tap_order,
        )

    @classmethod
    def of_taps(
        cls,
        taps: Sequence[Sequence[int]],
        stride: IntTuple,
        dilation: IntTuple,
        transposed: bool = False,
        sites: SiteRule = "reached",
    ) -> ConvGeometry:
        """Return a window of the given tap positions, in that order: ``padding`` is 0.

        ``kernel_size`` is the extent of the box around them.

        Raises:
            ValueError: There are no taps, or a position does not have one entry per axis.
        """
        positions = tuple(to_ntuple(tap, len(stride), "a tap") for tap in taps)
        if not positions:
            raise ValueError("a window must have at least one tap; got none.")
        extent = tuple(max(axis) - min(axis) + 1 for axis in zip(*positions, strict=True))
        return cls(
            kernel_size=extent,
            stride=stride,
            padding=(0,) * len(stride),
            dilation=dilation,
            transposed=transposed,
            sites=sites,
            taps=positions,
        )

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel_size)

    @cached_property
    def kernel_volume(self) -> int:
        """Number of taps."""
        return len(self.taps) or math.prod(self.kernel_size)

    @cached_property
    def offsets(self) -> tuple[IntTuple, ...]:
        """``dilation * tap - padding`` of every tap, in tap order: ``fine - stride * coarse``."""
        if self.taps:
            return tuple(
                tuple(d * t - p for t, p, d in zip(tap, self.padding, self.dilation, strict=True))
                for tap in self.taps
            )
        axes = [
            [d * t - p for t in range(k)]
            for k, p, d in zip(self.kernel_size, self.padding, self.dilation, strict=True)
        ]
        if self.tap_order == "last_axis_fastest":
            return tuple(itertools.product(*axes))
        return tuple(offset[::-1] for offset in itertools.product(*axes[::-1]))

    @cached_property
    def has_center(self) -> bool:
        """True when some tap has offset zero, through which a submanifold row sees itself."""
        return (0,) * self.ndim in self.offsets

    @cached_property
    def is_mirrored(self) -> bool:
        """True when inputs and outputs are one set and tap ``V-1-v`` points against tap ``v``.

        One neighbour table then serves both directions: tap ``v`` of an output row is tap ``V-1-v``
        of the same row seen as an input.
        """
        return self.sites == "same" and all(
            all(a == -b for a, b in zip(offset, mirror, strict=True))
            for offset, mirror in zip(self.offsets, self.offsets[::-1], strict=True)
        )

    @cached_property
    def max_outputs_per_input(self) -> int:
        """Largest number of outputs that one input can feed."""
        if not self.transposed and not self.taps and self.dilation == (1,) * self.ndim:
            bound = 1
            for size, step in zip(self.kernel_size, self.stride, strict=True):
                bound *= -(-size // step)
            return bound
        return self.kernel_volume

    @property
    def feeds_one_output(self) -> bool:
        """True when no input can feed two outputs, as in a window of 2x2x2 and stride 2.

        Kernel maps then list a pair per input at most: the inputs write the table of the outputs,
        and the list of the pairs is the table of the inputs.
        """
        return self.max_outputs_per_input == 1

    def output_shape(self, input_shape: IntTuple) -> IntTuple:
        """Return the output extents of a bounded grid, as the dense ``torch.nn`` layers do.

        Forward: ``(n + 2p - d(k-1) - 1) // s + 1``. Transposed:
        ``(n-1)s - 2p + d(k-1) + 1 + output_padding``. The result may be zero or negative; callers
        handle this case.

        Raises:
            ValueError: The window is a list of taps, for which dense layers have no formula.
        """
        if self.sites == "same":
            return tuple(input_shape)
        if self.taps:
            raise ValueError(
                "a window given by its taps needs an unbounded grid or given output sites; got a "
                f"bounded grid of shape {input_shape}."
            )
        axes = zip(
            input_shape,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.output_padding,
            strict=True,
        )
        if self.transposed:
            return tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 + e for n, k, s, p, d, e in axes)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in axes)

    def output_range(self, lower: IntTuple, upper: IntTuple) -> tuple[IntTuple, IntTuple]:
        """Return the smallest box that holds every output of inputs in ``[lower, upper]``.

        Serves unbounded, negative coordinates: both ends are inclusive, and an empty axis comes
        back with ``upper < lower``.
        """
        if self.sites == "same":
            return lower, upper
        if self.sites == "cells":
            return (
                tuple(lo // s for lo, s in zip(lower, self.stride, strict=True)),
                tuple(hi // s for hi, s in zip(upper, self.stride, strict=True)),
            )
        by_axis = list(zip(*self.offsets, strict=True))
        first, last = [min(axis) for axis in by_axis], [max(axis) for axis in by_axis]
        if self.transposed:
            low = [lo * s + f for lo, s, f in zip(lower, self.stride, first, strict=True)]
            high = [hi * s + z for hi, s, z in zip(upper, self.stride, last, strict=True)]
        else:
            low = [-((z - lo) // s) for lo, s, z in zip(lower, self.stride, last, strict=True)]
            high = [(hi - f) // s for hi, s, f in zip(upper, self.stride, first, strict=True)]
        return tuple(low), tuple(high)
