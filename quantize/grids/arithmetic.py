"""The float32 arithmetic that llama.cpp's block searches rest on, bit for bit: roundings, halves, and the kernel decorator.

Kernels run without fastmath and with IEEE division: the bytes of a file depend on the order and rounding of every operation.
Numbers stay float32 throughout: a bare Python literal would turn an expression into float64, hence the constants.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from r1q.core import blocks

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
Halves = NDArray[np.uint16]
P = ParamSpec("P")
R = TypeVar("R")

ZERO = np.float32(0.0)
ONE = np.float32(1.0)
HALF = np.float32(0.5)
TINY_GROUP = np.float32(1e-15)
"""A group whose largest magnitude is below this is stored as zeros (GROUP_MAX_EPS in llama.cpp's ggml-quants.c)."""

_ROUNDING = np.float32(12582912.0)  # 1.5 · 2**23: adding it leaves the nearest integer, half to even, in the mantissa
_INT_LIMIT = np.float32(2147483648.0)


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` into the kernels that call it. It divides by zero as IEEE 754 says."""
    return cast(Callable[P, R], numba.njit(nogil=True, error_model="numpy")(function))


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` to machine code that is kept on disk and releases the GIL, to be called from Python."""
    try:
        compiled = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
        # numba throws a kernel away when its own file changes, but not when a file changes whose kernels were inlined into it:
        # without this line, an upgrade or an edit could go on running old arithmetic.
        compiled._cache._cache_file._source_stamp = _sources()
    except (RuntimeError, AttributeError):
        # There is no folder to keep code in, or this numba keeps it in another way: compile it in every run.
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(Callable[P, R], compiled)


@functools.cache
def _sources() -> str:
    """Return a hash of every source file that a kernel's machine code can come from: those that import this one, and this one."""
    texts = [path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
    texts = [text for text in texts if b"arithmetic" in text] + [Path(blocks.__file__).read_bytes()]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


@inlined
def nearest(value: np.float32) -> np.int32:
    """Return the nearest integer, half to even, for |value| < 2**22; beyond, and for NaN, what C reads from the mantissa."""
    bits = np.float32(value + _ROUNDING).view(np.int32)
    return np.int32(np.int32(bits & np.int32(0x007FFFFF)) - np.int32(0x00400000))


@inlined
def nearest_between(value: np.float32, low: np.float32, high: np.float32) -> np.float32:
    """Return the nearest integer, at least `low` and at most `high`."""
    number = np.float32(nearest(value))
    number = high if number > high else number
    return low if number < low else number


@inlined
def truncated(value: np.float32) -> int:
    """Return `value` cut to an integer; 0 where C leaves the cast undefined (x86 then yields INT_MIN, whose low byte is 0)."""
    return int(np.int32(value)) if abs(value) < _INT_LIMIT else 0


@inlined
def rounded_away(value: np.float32) -> int:
    """Return the nearest integer, half away from zero (C's roundf), with `truncated`'s answer for what has none."""
    whole = truncated(value)
    rest = value - np.float32(whole)
    if abs(value) < _INT_LIMIT and abs(rest) >= HALF:
        return whole + (1 if value > ZERO else -1)
    return whole


@inlined
def half_bits(value: np.float32) -> np.uint16:
    """Return the bits of the float16 nearest to `value`, half to even, subnormals included; NaN becomes the quiet one."""
    bits = np.int64(np.float32(value).view(np.uint32))
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return np.uint16(sign | 0x7E00)
    if magnitude >= 0x477FF000:  # 65520, the first number that rounds past the largest half
        return np.uint16(sign | 0x7C00)
    if magnitude < 0x38800000:  # below 2**-14, where a half's last bit weighs 2**-24, as a float32's does next to 0.5
        shifted = np.int64(np.float32(abs(value) + HALF).view(np.uint32))
        return np.uint16(sign | (shifted - 0x3F000000))
    return np.uint16(sign | ((magnitude - 0x38000000 + 0x0FFF + ((magnitude >> 13) & 1)) >> 13))


@kernel
def store_halves(values: Floats, out: Halves) -> None:
    """Fill `out` with the bits of the halves nearest to `values`."""
    for i in range(values.size):
        out[i] = half_bits(values[i])


@inlined
def half_value(bits: np.uint16) -> np.float32:
    """Return the float32 that the float16 `bits` stand for."""
    sign, exponent, mantissa = (np.int64(bits) & 0x8000) << 16, (np.int64(bits) >> 10) & 31, np.int64(bits) & 1023
    if exponent == 0:
        small = np.float32(mantissa) * np.float32(2.0**-24)
        return -small if sign else small
    widened = 0x7F800000 if exponent == 31 else (exponent + 112) << 23
    return np.uint32(sign | widened | (mantissa << 13)).view(np.float32)


@inlined
def furthest(values: Floats) -> np.float32:
    """Return the value of largest magnitude, the first of several; 0 where none is above 0."""
    largest, magnitude = ZERO, ZERO
    for value in values:
        if abs(value) > magnitude:
            largest, magnitude = value, abs(value)
    return largest
