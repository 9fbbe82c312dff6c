"""Linear systems as machine code: a matrix factored with pivots, and solves with it and with its transpose.

Matrices lie column by column. Rows stay where they are: a pivot is the largest number of its column in a row that is
still free, and ``order`` says which row it was. So every loop runs over whole vectors, and nothing is ever swapped.
Source: Golub & Van Loan, Matrix Computations, section 3.4, with the permutation kept aside.
"""

from __future__ import annotations

from adjoint.engines.native.arrays import Arrays
from adjoint.engines.native.emit import BYTES, WHOLE, Code
from adjoint.engines.native.program import Kind

ARGUMENTS = "ptr noalias %a, ptr noalias %lower, ptr noalias %inverse, ptr noalias %order"
"""The matrix, which becomes U; L without its diagonal; one over each pivot; the row of each pivot."""


def algebra(kind: Kind, size: int, helpers: set[tuple[str, str]]) -> str:
    """The functions @factor, @solve, @turn and @solve_turned, which work on systems of this size."""
    return "\n\n".join(make(kind, size, helpers) for make in (_factor, _solve, _turn, _solve_turned))


def _factor(kind: Kind, size: int, helpers: set[tuple[str, str]]) -> str:
    """P A = L U. A column without pivots gives infinities, as it does in LAPACK's solves."""
    code = Code(f"define internal void @factor({ARGUMENTS}) noinline", 1, helpers)
    rows = Arrays(code, kind, size)
    bits, lanes = rows.bits, rows.lanes
    whole, truths = f"<{lanes} x {bits}>", f"<{lanes} x i1>"
    free = code.array(rows.stride * BYTES[kind])
    for place in rows.chunks():
        code.line(f"store {whole} zeroinitializer, ptr {rows.at(free, place)}, align {rows.align}")
    with code.loop(0, size) as i:
        code.line(f"store {bits} -1, ptr {rows.at(free, i)}, align {BYTES[kind]}")

    def masks(place: str) -> str:
        return rows.load(free, place, whole)

    def splat(value: str, type: str) -> str:
        one = code.let(f"insertelement <{lanes} x {type}> poison, {type} {value}, i64 0")
        return code.let(
            f"shufflevector <{lanes} x {type}> {one}, <{lanes} x {type}> poison, <{lanes} x i32> zeroinitializer"
        )

    def ranked(column: str, place: str) -> str:
        """Sizes as integers, which are ordered as they are; zero in rows that are not free."""
        x = code.let(f"bitcast {rows.vector} {rows.load(column, place)} to {whole}")
        positive = code.let(f"and {whole} {x}, splat ({bits} {2 ** (8 * BYTES[kind] - 1) - 1})")
        return code.let(f"and {whole} {code.let(f'add {whole} {positive}, splat ({bits} 1)')}, {masks(place)}")

    largest, pivot_row = code.place(bits, "0"), code.place("i64", "0")
    with code.loop(0, size) as k:
        column, below = rows.row("%a", k), rows.row("%lower", k)
        code.line(f"store {bits} 0, ptr {largest}")
        for place in rows.chunks():
            reduce = f"llvm.vector.reduce.umax.v{lanes}{bits}"
            helpers.add((f"{bits} @{reduce}({whole})", WHOLE))
            found = code.let(f"call {bits} @{reduce}({whole} {ranked(column, place)})")
            before = code.let(f"load {bits}, ptr {largest}")
            more = code.let(f"icmp ugt {bits} {found}, {before}")
            with code.when(more):
                alike = code.let(f"icmp eq {whole} {ranked(column, place)}, {splat(found, bits)}")
                word = code.let(f"bitcast {truths} {alike} to i{lanes}")
                helpers.add((f"i{lanes} @llvm.cttz.i{lanes}(i{lanes}, i1)", WHOLE))
                lane = code.let(f"call i{lanes} @llvm.cttz.i{lanes}(i{lanes} {word}, i1 true)")
                wide = code.let(f"zext i{lanes} {lane} to i64")
                code.line(f"store i64 {code.plus(place, wide)}, ptr {pivot_row}")
                code.line(f"store {bits} {found}, ptr {largest}")
        row = code.let(f"load i64, ptr {pivot_row}")
        code.line(f"store i64 {row}, ptr {code.at('%order', k, 'i64', False)}")
        inverse = code.let(f"fdiv {rows.scalar} 1.0, {rows.get(column, row)}")
        rows.put(inverse, "%inverse", k)
        factor = rows.spread(inverse)
        waiting = {}
        for place in rows.chunks():
            x, open_before = rows.load(column, place), code.let(f"icmp ne {whole} {masks(place)}, zeroinitializer")
            upper = code.let(f"select {truths} {open_before}, {rows.vector} zeroinitializer, {rows.vector} {x}")
            waiting[place] = upper
            lower = code.let(
                f"select {truths} {open_before}, {rows.vector} {rows.product(x, factor)}, {rows.vector} zeroinitializer"
            )
            rows.store(lower, below, place)
            rows.store(upper, column, place)
        rows.put("0.0", below, row)
        code.line(f"store {bits} 0, ptr {rows.at(free, row)}, align {BYTES[kind]}")
        with code.loop(code.plus(k, 1), size) as j:
            other = rows.row("%a", j)
            ahead = rows.get(other, row)
            with code.when(code.let(f"fcmp une {rows.scalar} {ahead}, 0.0")):
                take = rows.spread(code.let(f"fneg {rows.scalar} {ahead}"))
                for place in rows.chunks():
                    less = rows.product(take, rows.load(below, place))
                    rows.store(rows.sum(rows.load(other, place), less), other, place)
    return code.text()


def _solve(kind: Kind, size: int, helpers: set[tuple[str, str]]) -> str:
    """x = A^-1 b; b is used up."""
    code = Code(f"define internal void @solve({ARGUMENTS}, ptr noalias %b, ptr noalias %x) noinline", 1, helpers)
    rows = Arrays(code, kind, size)
    with code.loop(0, size) as k:
        row = code.load("%order", k, "i64", False)
        _take(rows, "%b", rows.get("%b", row), rows.row("%lower", k))
    with code.loop(0, size) as back:
        k = code.integer("sub", size - 1, back)
        row = code.load("%order", k, "i64", False)
        x = code.let(f"fmul {rows.scalar} {rows.get('%b', row)}, {rows.get('%inverse', k)}")
        rows.put(x, "%x", k)
        _take(rows, "%b", x, rows.row("%a", k))
    return code.text()


def _take(rows: Arrays, target: str, number: str, column: str) -> None:
    """target -= number column"""
    factor = rows.spread(rows.code.let(f"fneg {rows.scalar} {number}"))
    for place in rows.chunks():
        less = rows.product(factor, rows.load(column, place))
        rows.store(rows.sum(rows.load(target, place), less), target, place)


TURNED = "ptr noalias %upper_rows, ptr noalias %lower_rows"


def _turn(kind: Kind, size: int, helpers: set[tuple[str, str]]) -> str:
    """L and U row by row, in the order of the pivots."""
    code = Code(f"define internal void @turn({ARGUMENTS}, {TURNED}) noinline", 1, helpers)
    rows = Arrays(code, kind, size)
    with code.loop(0, size) as k:
        row = code.load("%order", k, "i64", False)
        for source, target in (("%a", "%upper_rows"), ("%lower", "%lower_rows")):
            place = rows.row(target, k)
            with code.loop(0, size) as j:
                rows.put(rows.get(rows.row(source, j), row), place, j)
    return code.text()


def _solve_turned(kind: Kind, size: int, helpers: set[tuple[str, str]]) -> str:
    """x = A^-T b; b is used up."""
    head = f"define internal void @solve_turned({TURNED}, ptr noalias %inverse, ptr noalias %order, "
    code = Code(f"{head}ptr noalias %b, ptr noalias %x) noinline", 1, helpers)
    rows = Arrays(code, kind, size)
    with code.loop(0, size) as k:
        z = code.let(f"fmul {rows.scalar} {rows.get('%b', k)}, {rows.get('%inverse', k)}")
        _take(rows, "%b", z, rows.row("%upper_rows", k))
        rows.put(z, "%b", k)
    with code.loop(0, size) as back:
        k = code.integer("sub", size - 1, back)
        z = rows.get("%b", k)
        rows.put(z, "%x", code.load("%order", k, "i64", False))
        _take(rows, "%b", z, rows.row("%lower_rows", k))
    return code.text()
