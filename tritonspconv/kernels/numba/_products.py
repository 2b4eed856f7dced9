"""Products of gathered rows with the taps' matrices, and of rows with rows, in registers.

A *tile* is `TILE_ROWS` pairs by one to three vectors of output channels. Its sums stay in registers
while a loop runs over the input channels. numba has no vectors, so the loops over one tile are
written in LLVM's language. Python code that numba compiles surrounds these loops.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from tritonspconv.kernels.numba._compile import compiled

# The number of multiplications that is worth a thread; it takes some 0.1 ms.
LEAST_WORK = 5_000_000
# Elements to copy that are worth a thread.
LEAST_COPIES = 200_000
# Bytes of the rows of a gradient that the tiles of a weight gradient read from the first cache.
_BLOCK_BYTES = 18 * 1024
_LINE_BYTES = 64

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_ELEMENTS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.int32: _I32}


@functools.lru_cache(maxsize=1)
def _features() -> frozenset[str]:
    """Return the names of the instruction sets that numba compiles for."""
    context: Any = cpu_target.target_context
    listed = context.codegen().magic_tuple()[2].split(",")
    return frozenset(name[1:] for name in listed if name.startswith("+"))


@functools.lru_cache(maxsize=1)
def vector_bytes() -> int:
    """Return the size of a vector register: 64, 32 or 16 bytes."""
    return 64 if "avx512f" in _features() else 32 if "avx2" in _features() else 16


@functools.lru_cache(maxsize=1)
def tile_rows() -> int:
    """Return the pairs of a tile: with three vectors a pair, most of the registers hold sums.

    It divides the multiple that lists of pairs are filled up to.
    """
    return 4 if vector_bytes() == 32 else 8


def has_bfloat16() -> bool:
    """Return whether the CPU multiplies pairs of bfloat16 and adds them in float32."""
    return vector_bytes() == 64 and "avx512bf16" in _features()


class _Tile:
    """Writes the code of a tile.

    Args:
        builder: The builder that receives the code.
        element: The numba type of an operand. An int32 holds two bfloat16 values.
    """

    def __init__(self, builder: Any, element: types.Type) -> None:
        self.builder = builder
        self.element = _ELEMENTS[element]
        self.bytes = 8 if element == types.float64 else 4
        self.lanes = vector_bytes() // self.bytes
        self.operand = ir.VectorType(self.element, self.lanes)
        sums = ir.FloatType() if element == types.int32 else self.element
        self.sums = ir.VectorType(sums, self.lanes)
        self.zero = ir.Constant(self.sums, [0.0] * self.lanes)

    def pointer(self, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
        """Return a pointer to ``offset`` bytes behind an address."""
        place = self.builder.add(address, _I64(offset)) if offset else address
        return self.builder.inttoptr(place, kind.as_pointer())

    def load(self, address: ir.Value, number: int, kind: ir.Type) -> ir.Value:
        """Load vector ``number`` of a row of any alignment."""
        pointer = self.pointer(address, number * vector_bytes(), kind)
        return self.builder.load(pointer, align=self.bytes)

    def store(self, address: ir.Value, number: int, value: ir.Value) -> None:
        """Store operands as vector ``number`` of a row of any alignment."""
        pointer = self.pointer(address, number * vector_bytes(), self.operand)
        self.builder.store(value, pointer, align=self.bytes)

    def add_to_memory(self, address: ir.Value, number: int, value: ir.Value) -> None:
        """Add ``value`` to vector ``number`` of a row."""
        pointer = self.pointer(address, number * vector_bytes(), self.sums)
        held = self.builder.load(pointer, align=self.bytes)
        self.builder.store(self.builder.fadd(held, value), pointer, align=self.bytes)

    def broadcast(self, address: ir.Value) -> ir.Value:
        """Load an element into all lanes."""
        value = self.builder.load(self.pointer(address, 0, self.element))
        undefined = ir.Constant(self.operand, ir.Undefined)
        alone = self.builder.insert_element(undefined, value, _I32(0))
        lanes = ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(alone, undefined, lanes)

    def row(self, base: ir.Value, number: ir.Value, row_bytes: ir.Value) -> ir.Value:
        """Return the address of row ``number``."""
        return self.builder.add(base, self.builder.mul(number, row_bytes))

    def address(self, index: ir.Value, base: ir.Value, row_bytes: ir.Value) -> ir.Value:
        """Return the address of the row that the int32 at ``index`` names."""
        number = self.builder.load(self.builder.inttoptr(index, _I32.as_pointer()))
        return self.row(base, self.builder.sext(number, _I64), row_bytes)

    def addresses(self, indices: ir.Value, base: ir.Value, row_bytes: ir.Value) -> list[ir.Value]:
        """Return the addresses of the rows of a tile."""
        places = [self.builder.add(indices, _I64(4 * m)) for m in range(tile_rows())]
        return [self.address(place, base, row_bytes) for place in places]

    def multiply_add(self, left: ir.Value, right: ir.Value, total: ir.Value) -> ir.Value:
        """Return ``total + left * right``, with one rounding where the CPU can."""
        module = self.builder.module
        if self.element is _I32:
            pairs = _TwoBfloat16(self.lanes)
            name = "llvm.x86.avx512bf16.dpbf16ps.512"
            kind = ir.FunctionType(self.sums, [self.sums, pairs, pairs])
            operands = [self.builder.bitcast(value, pairs) for value in (left, right)]
            return self.builder.call(
                cgutils.get_or_insert_function(module, kind, name), [total, *operands]
            )
        name = f"llvm.fmuladd.v{self.lanes}f{8 * self.bytes}"
        kind = ir.FunctionType(self.sums, [self.sums] * 3)
        return self.builder.call(
            cgutils.get_or_insert_function(module, kind, name), [left, right, total]
        )


class _TwoBfloat16(ir.VectorType):
    """Vector of two bfloat16 in each of ``lanes`` lanes; llvmlite has no name for the type."""

    def __init__(self, lanes: int) -> None:
        super().__init__(ir.IntType(16), 2 * lanes)

    def _to_string(self) -> str:
        return f"<{self.count} x bfloat>"


class _HeldSums:
    """Writes the code of sums that stay in registers: some vectors for each row of a tile.

    Args:
        tile: The tile.
        vectors: Vectors of a row.
    """

    def __init__(self, tile: _Tile, vectors: int) -> None:
        self.tile = tile
        self.rows = [
            [cgutils.alloca_once_value(tile.builder, tile.zero) for _ in range(vectors)]
            for _ in range(tile_rows())
        ]

    def add_products(self, elements: list[ir.Value], line: ir.Value) -> None:
        """Add to each row its element times the vectors at ``line``; all are addresses."""
        tile, builder = self.tile, self.tile.builder
        factors = [tile.load(line, n, tile.operand) for n in range(len(self.rows[0]))]
        for row, address in zip(self.rows, elements, strict=True):
            element = tile.broadcast(address)
            for held, factor in zip(row, factors, strict=True):
                total = tile.multiply_add(element, factor, builder.load(held))
                builder.store(total, held)

    def add_to_memory(self, targets: list[ir.Value]) -> None:
        """Add each row of sums to the row of memory at its address."""
        for row, target in zip(self.rows, targets, strict=True):
            for n, held in enumerate(row):
                self.tile.add_to_memory(target, n, self.tile.builder.load(held))


def _product_tile(vectors: int) -> Any:
    """Return the tile of ``vectors`` vectors of output channels."""

    @intrinsic
    def tile(typing, feats, x, x_bytes, rows, matrix, depth, columns, sums, sums_bytes):
        """Add ``x[rows[m]] @ matrix`` to ``sums[columns[m]]`` for each pair m of the tile.

        ``feats`` only gives the type of the operands. All other arguments are addresses or numbers:
        rows of ``x_bytes`` bytes and ``depth`` elements, ``matrix`` [depth, vectors] of vectors,
        ``sums`` of ``sums_bytes`` bytes a row.
        """
        signature = types.void(feats, *(types.int64,) * 8)

        def emit(context, builder, signature, args):
            _, x, x_bytes, rows, matrix, depth, columns, sums, sums_bytes = args
            tile = _Tile(builder, feats.dtype)
            sources = tile.addresses(rows, x, x_bytes)
            held = _HeldSums(tile, vectors)
            with cgutils.for_range(builder, depth) as loop:
                line = tile.row(matrix, loop.index, _I64(vectors * vector_bytes()))
                elements = [tile.row(source, loop.index, _I64(tile.bytes)) for source in sources]
                held.add_products(elements, line)
            held.add_to_memory(tile.addresses(columns, sums, sums_bytes))
            return context.get_dummy_value()

        return signature, emit

    return tile


def _outer_tile(vectors: int) -> Any:
    """Return the tile of ``vectors`` vectors of output channels and `tile_rows` of input ones."""

    @intrinsic
    def tile(typing, feats, x, x_bytes, g, count, total, total_bytes):
        """Add the sum over pairs p of ``x[p][m] * g[p]`` to row m of ``total``.

        ``feats`` only gives the type of the operands. All other arguments are addresses or numbers:
        ``count`` rows ``x`` of ``x_bytes`` bytes, ``g`` [count, vectors] of vectors, rows ``total``
        of ``total_bytes`` bytes.
        """
        signature = types.void(feats, *(types.int64,) * 6)

        def emit(context, builder, signature, args):
            _, x, x_bytes, g, count, total, total_bytes = args
            tile = _Tile(builder, feats.dtype)
            numbers = [_I64(m) for m in range(tile_rows())]
            held = _HeldSums(tile, vectors)
            with cgutils.for_range(builder, count) as loop:
                source = tile.row(x, loop.index, x_bytes)
                line = tile.row(g, loop.index, _I64(vectors * vector_bytes()))
                elements = [tile.row(source, number, _I64(tile.bytes)) for number in numbers]
                held.add_products(elements, line)
            held.add_to_memory([tile.row(total, number, total_bytes) for number in numbers])
            return context.get_dummy_value()

        return signature, emit

    return tile


def _gather_tile(vectors: int) -> Any:
    """Return the copy of ``vectors`` vectors of each of some rows."""

    @intrinsic
    def tile(typing, feats, rows, x, x_bytes, count, out, out_bytes):
        """Copy the beginning of ``x[rows[p]]`` to row p of ``out``, for ``count`` numbers p.

        Arguments as in :func:`_product_tile`.
        """
        signature = types.void(feats, *(types.int64,) * 6)

        def emit(context, builder, signature, args):
            _, rows, x, x_bytes, count, out, out_bytes = args
            tile = _Tile(builder, feats.dtype)
            with cgutils.for_range(builder, count) as loop:
                source = tile.address(tile.row(rows, loop.index, _I64(4)), x, x_bytes)
                target = tile.row(out, loop.index, out_bytes)
                for n in range(vectors):
                    tile.store(target, n, tile.load(source, n, tile.operand))
            return context.get_dummy_value()

        return signature, emit

    return tile


def _prefetch_line(typing, address):
    """Prefetch the cache line at an address that is read soon."""

    def emit(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # The three numbers mean: prefetch for reading, into the first cache, data.
        builder.call(call, [builder.inttoptr(args[0], byte), _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), emit


def _rounded_once(typing, left, right, addend):
    """Return ``left * right + addend``, with one rounding where the CPU can."""

    def emit(context, builder, signature, args):
        kind, bits = args[0].type, left.bitwidth
        name = f"llvm.fmuladd.f{bits}"
        function = ir.FunctionType(kind, [kind] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)

    return left(left, left, left), emit


_prefetch: Any = intrinsic(_prefetch_line)
_multiply_add: Any = intrinsic(_rounded_once)
_product_1, _product_2, _product_3 = (_product_tile(vectors) for vectors in (1, 2, 3))
_outer_1, _outer_2, _outer_3 = (_outer_tile(vectors) for vectors in (1, 2, 3))
_gather_1, _gather_2, _gather_3 = (_gather_tile(vectors) for vectors in (1, 2, 3))


@compiled
def _block(vectors):
    """Return how many of the ``vectors`` that are left the next tile takes: 3, or fewer."""
    if vectors == 4:
        return 2
    return min(vectors, 3)


@compiled
def pack(first_tap, last_tap, weight, lanes, packed):
    """Copy matrices of [V, c_in, c_out] into blocks of columns that tiles read line by line.

    A tap's blocks follow each other in ``packed`` [V, c_in * vectors * lanes]; each is
    [c_in, vectors of the block * lanes], filled up with zeros.
    """
    _, c_in, c_out = weight.shape
    lines = np.arange(c_in, dtype=np.int32)
    whole_vectors = c_out % lanes == 0 and weight.strides[2] == weight.itemsize
    for tap in range(first_tap, last_tap):
        matrix = weight[tap]
        if whole_vectors:
            x, x_bytes = matrix.ctypes.data, matrix.strides[0]
            _gather(matrix, lines.ctypes.data, x, x_bytes, lanes, c_in, packed[tap], 0)
        else:
            _pack_elements(matrix, lanes, packed[tap])


@compiled
def _pack_elements(matrix, lanes, packed):
    """Copy [c_in, c_out] of any strides into blocks of columns, see :func:`pack`."""
    c_in, c_out = matrix.shape
    vectors = (c_out + lanes - 1) // lanes
    first = 0
    while first < vectors:
        block = _block(vectors - first)
        width, start = block * lanes, first * lanes
        held = min(width, c_out - start)
        out = packed[start * c_in : (start + width) * c_in].reshape(c_in, width)
        for k in range(c_in):
            line, target = matrix[k, start : start + held], out[k]
            for column in range(held):
                target[column] = line[column]
            for column in range(held, width):
                target[column] = 0
        first += block


@compiled
def multiply_panels(
    first, last, width, starts, counts, columns, rows, feats, packed, lanes, step, bias, norm,
    residual, relu, out,
):  # fmt: skip
    """Write the outputs of the panels from ``first`` to ``last``.

    Args:
        first: The first panel.
        last: The panel behind the last one.
        width: Columns of a panel.
        starts: See ``PanelPairs``.
        counts: See ``PanelPairs``.
        columns: See ``PanelPairs``.
        rows: See ``PanelPairs``.
        feats: [N, c_in].
        packed: See :func:`pack`.
        lanes: Elements of a vector.
        step: Pairs of a tile.
        bias: [c_out], or [0].
        norm: [2, c_out], scale and shift of each channel; or [0, 0].
        residual: [n, c_out], or [0, 0].
        relu: Clamp at zero.
        out: [n, c_out].
    """
    volume, n = packed.shape[0], out.shape[0]
    vectors = (out.shape[1] + lanes - 1) // lanes
    sums = np.empty((width + 1, vectors * lanes), out.dtype)
    for panel in range(first, last):
        sums[:] = 0
        for tap in range(volume):
            start, count = starts[panel * volume + tap], counts[panel * volume + tap]
            _multiply_list(
                start, start + count, columns, rows, feats, packed[tap], lanes, step, sums
            )
        top, end = panel * width, min(panel * width + width, n)
        _finish(sums, bias, norm, residual, relu, top, end, out)


@compiled
def _fetch_rows(x, x_bytes, rows, first, last):
    """Prefetch the rows of the pairs from ``first`` to ``last``, as far as there are pairs."""
    for place in range(first, min(last, rows.shape[0])):
        row = x + np.int64(rows[place]) * x_bytes
        for line in range(0, x_bytes, 64):
            _prefetch(row + line)


@compiled
def _multiply_list(start, end, columns, rows, feats, matrix, lanes, step, sums):
    """Add to ``sums`` the products of the pairs from ``start`` to ``end``, all of one tap.

    The last tile ends behind ``end``, where the pairs are that fill the list up.
    """
    depth, vectors, size = feats.shape[1], sums.shape[1] // lanes, sums.itemsize
    x, x_bytes, sums_bytes = feats.ctypes.data, depth * size, sums.shape[1] * size
    for place in range(start, end, step):
        _fetch_rows(x, x_bytes, rows, place + step, place + 2 * step)
        row, column = rows.ctypes.data + 4 * place, columns.ctypes.data + 4 * place
        vector = 0
        while vector < vectors:
            block = _block(vectors - vector)
            into = sums.ctypes.data + vector * lanes * size
            factor = matrix.ctypes.data + vector * lanes * size * depth
            if block == 3:
                _product_3(feats, x, x_bytes, row, factor, depth, column, into, sums_bytes)
            elif block == 2:
                _product_2(feats, x, x_bytes, row, factor, depth, column, into, sums_bytes)
            else:
                _product_1(feats, x, x_bytes, row, factor, depth, column, into, sums_bytes)
            vector += block


@compiled
def _finish(sums, bias, norm, residual, relu, top, end, out):
    """Finish sums (bias, norm, residual, ReLU) and write them to the rows from ``top`` to ``end``.

    One call serves a panel, because the arguments of a call cost as much as 200 channels.
    """
    channels = out.shape[1]
    for row in range(top, end):
        line, written = sums[row - top], out[row]
        if bias.shape[0]:
            for c in range(channels):
                line[c] += bias[c]
        if norm.shape[0]:
            for c in range(channels):
                line[c] = _multiply_add(line[c], norm[0, c], norm[1, c])
        if residual.shape[0]:
            for c in range(channels):
                line[c] += residual[row, c]
        if relu:
            for c in range(channels):
                # The comparison keeps NaN, like torch's ReLU.
                written[c] = 0 if line[c] <= 0 else line[c]
        else:
            for c in range(channels):
                written[c] = line[c]


@compiled
def add_outer_products(
    first, last, width, starts, counts, columns, rows, feats, grad, lanes, step, reverse, totals
):
    """Add to rows of tiles of ``totals`` the sums over all pairs of ``feats[i]^T grad[o]``.

    The pairs of a list are first copied side by side, some at a time: then each tile reads
    consecutive rows, those of ``grad`` from the first cache.

    Args:
        first: The first row of tiles: ``step`` input channels of a tap. Row of tiles t is of tap
            ``t // (c_in / step)`` of the lists.
        last: The row of tiles behind the last one.
        width: Columns of a panel.
        starts: See ``PanelPairs``.
        counts: See ``PanelPairs``.
        columns: See ``PanelPairs``.
        rows: See ``PanelPairs``.
        feats: [N, at least c_in], its width a multiple of ``lanes``.
        grad: [n, c_out], c_out a multiple of ``lanes``.
        lanes: Elements of a vector.
        step: Input channels of a tile.
        reverse: Tap v of the lists is tap V-1-v of ``totals``.
        totals: [V, c_in, c_out], c_in a multiple of ``step``.
    """
    volume, parts, size = totals.shape[0], totals.shape[1] // step, feats.itemsize
    x_bytes, g_bytes = feats.shape[1] * size, grad.shape[1] * size
    held = _BLOCK_BYTES // (3 * lanes * size)
    # Without the line between them, rows of some widths would compete for few sets of the cache.
    pitch = x_bytes + _LINE_BYTES
    x, g = np.empty(held * pitch // size, feats.dtype), np.empty(held * grad.shape[1], feats.dtype)
    for number in range(counts.shape[0]):
        panel, tap = number // volume, number % volume
        first_part, last_part = max(first - tap * parts, 0), min(last - tap * parts, parts)
        if first_part >= last_part:
            continue
        top = grad.ctypes.data + panel * width * g_bytes
        total = totals[volume - 1 - tap if reverse else tap, first_part * step : last_part * step]
        end = starts[number] + counts[number]
        for start in range(starts[number], end, held):
            count = min(held, end - start)
            row, column = rows.ctypes.data + 4 * start, columns.ctypes.data + 4 * start
            _gather(feats, row, feats.ctypes.data, x_bytes, lanes, count, x, pitch)
            _gather(grad, column, top, g_bytes, lanes, count, g, 0)
            source = x.ctypes.data + first_part * step * size
            _add_tiles(feats, source, pitch, g, count, lanes, step, total)


@compiled
def _gather(matrix, rows, x, x_bytes, lanes, count, out, pitch):
    """Copy the rows of ``x`` that ``count`` int32 at ``rows`` name.

    Args:
        matrix: [N, c], gives the type and the width of the rows; c is a multiple of ``lanes``.
        rows: Address.
        x: Address.
        x_bytes: Bytes of a row of ``x``.
        lanes: Elements of a vector.
        count: Number of rows.
        out: Receives the rows.
        pitch: Bytes of a row of ``out``. 0: ``out`` holds blocks of columns one after the other,
            each [count, vectors of the block * lanes].
    """
    unit, vectors = lanes * matrix.itemsize, matrix.shape[1] // lanes
    vector = 0
    while vector < vectors:
        block = _block(vectors - vector)
        source, out_bytes = x + vector * unit, pitch or block * unit
        target = out.ctypes.data + vector * unit * (1 if pitch else count)
        if block == 3:
            _gather_3(matrix, rows, source, x_bytes, count, target, out_bytes)
        elif block == 2:
            _gather_2(matrix, rows, source, x_bytes, count, target, out_bytes)
        else:
            _gather_1(matrix, rows, source, x_bytes, count, target, out_bytes)
        vector += block


@compiled
def _add_tiles(feats, x, x_bytes, g, count, lanes, step, total):
    """Add the outer products of ``count`` pairs to ``total`` [input channels, c_out]."""
    unit, total_bytes = lanes * feats.itemsize, total.shape[1] * feats.itemsize
    vector, vectors = 0, total.shape[1] // lanes
    while vector < vectors:
        block = _block(vectors - vector)
        target = g.ctypes.data + vector * unit * count
        for k in range(0, total.shape[0], step):
            source = x + k * feats.itemsize
            into = total.ctypes.data + k * total_bytes + vector * unit
            if block == 3:
                _outer_3(feats, source, x_bytes, target, count, into, total_bytes)
            elif block == 2:
                _outer_2(feats, source, x_bytes, target, count, into, total_bytes)
            else:
                _outer_1(feats, source, x_bytes, target, count, into, total_bytes)
        vector += block
