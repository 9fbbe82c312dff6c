"""Functions of whole vectors, where the C library would take them apart lane by lane."""

from __future__ import annotations

import math
import struct

from adjoint.engines.native.program import Kind

TERMS = 13
"""Of the series of exp(r) for |r| <= log(2) / 2: what is left out is below 5e-18."""


def exponential(name: str, kind: Kind, width: int) -> str:
    """exp(x) = 2^n exp(r), with n the integer nearest to x / log(2) and r = x - n log(2) in two parts.

    Source: Cody & Waite (1980), Software Manual for the Elementary Functions, chapter 6. In single precision it is
    computed in double, and rounded once.
    """
    wide, whole = f"<{width} x double>", f"<{width} x i64>"
    given = wide if kind == "f64" else f"<{width} x float>"
    lines = [f"define internal {given} @{name}({given} %x) {{"]
    count = 0

    def let(text: str) -> str:
        nonlocal count
        count += 1
        lines.append(f"  %v{count} = {text}")
        return f"%v{count}"

    def splat(number: float) -> str:
        return f"splat (double 0x{struct.pack('>d', number).hex().upper()})"

    def fused(a: str, b: str, c: str) -> str:
        return let(f"call {wide} @llvm.fma.v{width}f64({wide} {a}, {wide} {b}, {wide} {c})")

    x = "%x" if kind == "f64" else let(f"fpext {given} %x to {wide}")
    most, least = (f"{wide} {splat(bound)}" for bound in (710.0, -746.0))  # infinite, and zero, from there on
    inside = let(f"call {wide} @llvm.minnum.v{width}f64({wide} {x}, {most})")
    inside = let(f"call {wide} @llvm.maxnum.v{width}f64({wide} {inside}, {least})")
    n = let(
        f"call {wide} @llvm.roundeven.v{width}f64({wide} {let(f'fmul {wide} {inside}, {splat(math.log2(math.e))}')})"
    )
    high = 0.693147180369123816490  # its last 21 bits are zero: n times it is exact
    r = fused(n, splat(-high), inside)
    r = fused(n, splat(-1.90821492927058770002e-10), r)
    value = splat(1 / math.factorial(TERMS))
    for k in reversed(range(TERMS)):
        value = fused(value, r, splat(1 / math.factorial(k)))
    exponent = let(f"fptosi {wide} {n} to {whole}")
    half = let(f"ashr {whole} {exponent}, splat (i64 1)")
    for part in (half, let(f"sub {whole} {exponent}, {half}")):  # in two factors, which both are normal numbers
        bits = let(f"shl {whole} {let(f'add {whole} {part}, splat (i64 1023)')}, splat (i64 52)")
        value = let(f"fmul {wide} {value}, {let(f'bitcast {whole} {bits} to {wide}')}")
    unordered = let(f"fcmp uno {wide} {x}, {x}")
    value = let(f"select <{width} x i1> {unordered}, {wide} {x}, {wide} {value}")
    if kind == "f32":
        value = let(f"fptrunc {wide} {value} to {given}")
    return "\n".join([*lines, f"  ret {given} {value}", "}"])


def needed(width: int) -> set[tuple[str, str]]:
    """What :func:`exponential` calls, as :func:`declarations` is told."""
    calls = {"fma": 3, "minnum": 2, "maxnum": 2, "roundeven": 1}
    return {(f"llvm.{name}.v{width}f64", f"f64 {width} {count}") for name, count in calls.items()}
