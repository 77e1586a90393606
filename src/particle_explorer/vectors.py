"""Sixteen rows of an image at a time, which numba cannot say but LLVM can: the inner steps of a shear.

LLVM cuts its vectors into what the processor has. Called from compiled functions alone; numba keeps those by
the age of their own file, so after a change here touch `shears` too.
"""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

TAPS = 8
LANES = 16
"""Rows that are turned into columns together: a register of 512 bits holds two pixels of each."""
COLUMNS = 2 * LANES
"""Pixels of a row that are turned together."""
MOST = 8191
"""The largest pixel of an image in 16 bits: each of the first two shears at most doubles it."""
ONE = 14
"""Filters are counted in 2⁻¹⁴."""

_FUSED = f"llvm.fmuladd.v{LANES}f32"
_INT = ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(ir.IntType(32), LANES)
"""A number of 32 bits, or two of 16, of every row."""
_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_SHORT_PAIRS = ir.VectorType(ir.IntType(16), COLUMNS)


def _load(builder: Any, pointer: Any, kind: Any) -> Any:
    found = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    found.align = kind.element.width // 8 if isinstance(kind.element, ir.IntType) else 4
    return found


def _store(builder: Any, value: Any, pointer: Any) -> None:
    kind = value.type
    stored = builder.store(value, builder.bitcast(pointer, kind.as_pointer()))
    stored.align = kind.element.width // 8 if isinstance(kind.element, ir.IntType) else 4


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _all(number: int) -> Any:
    return ir.Constant(_WORDS, [number] * LANES)


def _everywhere(builder: Any, number: Any) -> Any:
    nothing = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, nothing, _all(0))


def _products(context: Any, builder: Any, a: Any, b: Any) -> Any:
    """Of two pairs of 16 bits each, in every lane: the sum of both products, in 32."""
    features = context.codegen().magic_tuple()[2]
    if "+avx512bw" in features:
        pairs = [builder.bitcast(x, _SHORT_PAIRS) for x in (a, b)]
        return _call(builder, "llvm.x86.avx512.pmaddw.d.512", _WORDS, *pairs)
    if "+avx2" in features:
        eight = ir.VectorType(ir.IntType(32), 8)
        sixteen = ir.VectorType(ir.IntType(16), 16)
        parts = []
        for half in (range(8), range(8, 16)):
            lanes = ir.Constant(eight, list(half))
            pairs = [builder.bitcast(builder.shuffle_vector(x, x, lanes), sixteen) for x in (a, b)]
            parts.append(_call(builder, "llvm.x86.avx2.pmadd.wd", eight, *pairs))
        return builder.shuffle_vector(*parts, ir.Constant(_WORDS, list(range(LANES))))
    high = [builder.ashr(x, _all(16)) for x in (a, b)]
    low = [builder.ashr(builder.shl(x, _all(16)), _all(16)) for x in (a, b)]
    return builder.add(builder.mul(*low), builder.mul(*high))


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors of sixteen words, rows to columns: within quarters of a register, then quarters."""

    def pick(a: Any, b: Any, lanes: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(_WORDS, lanes))

    quarters = range(0, LANES, 4)
    low = [i for q in quarters for i in (q, q + 16, q + 1, q + 17)]
    high = [i for q in quarters for i in (q + 2, q + 18, q + 3, q + 19)]
    low_pairs = [i for q in quarters for i in (q, q + 1, q + 16, q + 17)]
    high_pairs = [i for q in quarters for i in (q + 2, q + 3, q + 18, q + 19)]
    even = [*range(4), *range(8, 12), *range(16, 20), *range(24, 28)]
    odd = [i + 4 for i in even]
    half = [pick(rows[i], rows[i + 1], part) for i in range(0, LANES, 2) for part in (low, high)]
    fours = [
        pick(half[g + part], half[g + part + 2], pairs)
        for g in quarters
        for part in (0, 1)
        for pairs in (low_pairs, high_pairs)
    ]
    columns: list[Any] = [None] * LANES
    for c in range(4):
        a, b, d, e = fours[c::4]
        for place, part in ((0, even), (4, odd)):
            first, second = pick(a, b, part), pick(d, e, part)
            columns[place + c], columns[place + 8 + c] = pick(first, second, even), pick(first, second, odd)
    return columns


@intrinsic
def shorten(typing, row, j, factor, added, out, at):  # type: ignore[no-untyped-def]
    """Pixels `j` … `j + 15` of `row`, times `factor` plus `added`, in 16 bits, to `out` at `at`; `added` has
    half a step more and `MOST` + 1 more, so that what is cut off rounds."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = [_data(context, builder, signature, arguments, i) for i in (0, 4)]
        pixels = _load(builder, builder.gep(data[0], [arguments[1]]), _FLOATS)
        factor, added = (_everywhere(builder, arguments[i]) for i in (2, 3))
        whole = builder.fptosi(_call(builder, _FUSED, _FLOATS, pixels, factor, added), _WORDS)
        short = builder.trunc(builder.sub(whole, _all(MOST + 1)), _SHORTS)
        _store(builder, short, builder.gep(data[1], [arguments[5]]))
        return context.get_dummy_value()

    return types.void(row, types.int64, types.float32, types.float32, out, types.int64), code


@intrinsic
def stand_up(typing, source, offsets, j, tile):  # type: ignore[no-untyped-def]
    """Of sixteen rows, which begin at `offsets` `(16,)` of `source`, the pixels `j` … `j + 31`: columns of
    `tile`, two pixels wide, one after the other."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = [_data(context, builder, signature, arguments, i) for i in (0, 1, 3)]
        rows = []
        for r in range(LANES):
            start = builder.load(builder.gep(data[1], [ir.Constant(_INT, r)]))
            rows.append(
                builder.bitcast(
                    _load(builder, builder.gep(data[0], [builder.add(start, arguments[2])]), _SHORT_PAIRS),
                    _WORDS,
                )
            )
        at = builder.mul(arguments[2], ir.Constant(_INT, LANES // 2))
        for c, column in enumerate(_transposed(builder, rows)):
            place = builder.add(at, ir.Constant(_INT, c * LANES))
            _store(builder, column, builder.gep(data[2], [place]))
        return context.get_dummy_value()

    return types.void(source, offsets, types.int64, tile), code


def _filtering(adds: bool) -> Any:
    @intrinsic
    def filtered(typing, tile, j, filters, out, at, stride, factor):  # type: ignore[no-untyped-def]
        """Pixels `j` … `j + 31` of `tile` under `filters` `(4, 16)`, to `out` at `at`, `at + stride` …, or
        times `factor` added to it."""

        def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            data = [_data(context, builder, signature, arguments, i) for i in (0, 2, 3)]

            def words(pointer: Any, first: Any, number: int) -> Any:
                place = builder.add(first, ir.Constant(_INT, number * LANES))
                return _load(builder, builder.gep(pointer, [place]), _WORDS)

            weights = [words(data[1], ir.Constant(_INT, 0), k) for k in range(TAPS // 2)]
            start = builder.mul(arguments[1], ir.Constant(_INT, LANES // 2))
            factor = _everywhere(builder, arguments[6])

            def put(columns: list[Any], place: Any) -> Any:
                total = _all(0 if adds else 1 << (ONE - 1))
                for weight, column in zip(weights, columns, strict=True):
                    total = builder.add(total, _products(context, builder, column, weight))
                pointer = builder.gep(data[2], [place])
                if adds:
                    before = _load(builder, pointer, _FLOATS)
                    number = builder.sitofp(total, _FLOATS)
                    _store(builder, _call(builder, _FUSED, _FLOATS, number, factor, before), pointer)
                else:
                    _store(builder, builder.trunc(builder.ashr(total, _all(ONE)), _SHORTS), pointer)
                return builder.add(place, arguments[5])

            def between(a: Any, b: Any) -> Any:
                """The second pixel of `a` and the first of `b`."""
                return _call(builder, f"llvm.fshl.v{LANES}i32", _WORDS, b, a, _all(16))

            # no more than a window of columns, or they leave the registers
            even, place = [words(data[0], start, k) for k in range(TAPS // 2)], arguments[4]
            odd = [between(a, b) for a, b in itertools.pairwise(even)]
            for k in range(LANES):
                place = put(even, place)
                even = [*even[1:], words(data[0], start, k + TAPS // 2)]
                odd.append(between(*even[-2:]))
                place = put(odd, place)
                odd = odd[1:]
            return context.get_dummy_value()

        return types.void(tile, types.int64, filters, out, types.int64, types.int64, types.float32), code

    return filtered


def _data(context: Any, builder: Any, signature: Any, arguments: Any, i: int) -> Any:
    return context.make_array(signature.args[i])(context, builder, arguments[i]).data


put_filtered, add_filtered = _filtering(False), _filtering(True)
