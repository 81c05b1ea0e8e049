"""Which kernel codes which grid, and with which numbers: one row a grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from r1q.core.integers import middle
from r1q.core.scheme import Scheme
from r1q.quantize.gptq.scale_and_floor import code_scale_and_floor
from r1q.quantize.gptq.single_scale import code_single_scale
from r1q.quantize.gptq.super_blocks import code_offset, code_signed
from r1q.quantize.grids import quantize_rows

if TYPE_CHECKING:
    from r1q.quantize.gptq import Panel

_SCALE_ZERO = 32
TRIES = 1


def _single(
    scheme: Scheme, work: Panel, codes: Any, fields: Any, missed: Any, *, zero: int, low: int, high: int
) -> None:
    name = "scales" if scheme.facts.family == "int" else "d"
    size = codes.shape[1] // fields[name].shape[1]
    code_single_scale(
        work.targets, work.weights, work.mix, work.stiffness, size, zero, np.float32(low), np.float32(high), 2 * TRIES,
        codes, fields[name], missed,
    )  # fmt: skip


def _floor(scheme: Scheme, work: Panel, codes: Any, fields: Any, missed: Any) -> None:
    integer = scheme.facts.family == "int"
    scales, floors = (fields["scales"], fields["zeros"]) if integer else (fields["d"], fields["m"])
    size, top = codes.shape[1] // scales.shape[1], (1 << scheme.facts.bits) - 1
    code_scale_and_floor(
        work.targets, work.weights, work.mix, work.stiffness, size, top, integer, TRIES, codes, scales, floors, missed
    )


def _offset(scheme: Scheme, work: Panel, codes: Any, fields: Any, missed: Any, *, size: int, limit: int) -> None:
    _, first = quantize_rows(scheme.grid, work.targets, work.stiffness, threads=1)
    for name in ("d", "dmin"):
        fields[name][:] = first[name].view(np.uint16)
    code_offset(
        work.targets, work.weights, work.mix, work.stiffness, size, (1 << scheme.facts.bits) - 1, limit, TRIES,
        fields["d"][:, 0], fields["dmin"][:, 0], codes, fields["sc"], fields["m"], missed,
    )  # fmt: skip


def _signed(
    scheme: Scheme, work: Panel, codes: Any, fields: Any, missed: Any, *,
    size: int, zero: int, levels: tuple[int, int], scales: tuple[int, int],
) -> None:  # fmt: skip
    _, first = quantize_rows(scheme.grid, work.targets, work.stiffness, threads=1)
    fields["d"][:] = first["d"].view(np.uint16)
    small = np.empty(fields["sc"].shape, np.int8)
    code_signed(
        work.targets, work.weights, work.mix, work.stiffness, size, zero, np.float32(levels[0]), np.float32(levels[1]),
        *scales, 2 * TRIES, fields["d"][:, 0], codes, small, missed,
    )  # fmt: skip
    fields["sc"][:] = small if fields["sc"].dtype == np.int8 else small.astype(np.int16) + _SCALE_ZERO


def _integer(scheme: Scheme, work: Panel, codes: Any, fields: Any, missed: Any) -> None:
    if not scheme.symmetric:
        _floor(scheme, work, codes, fields, missed)
        return
    zero, low, high = symmetric_levels(scheme.facts.bits)
    _single(scheme, work, codes, fields, missed, zero=zero, low=low, high=high)


def symmetric_levels(bits: int) -> tuple[int, int, int]:
    """Return the code of zero, the lowest and the highest level of the symmetric integers."""
    zero = middle(bits)
    # −128 is left out at 8 bits, as in Q8_0
    return zero, -127 if bits == 8 else -zero, zero - 1


# Levels whose low is above their high are the codebook of iq4 (lane_coding).
CODERS: Mapping[str, Callable[..., None]] = MappingProxyType(
    {
        "q4_0": partial(_single, zero=8, low=-8, high=7),
        "q5_0": partial(_single, zero=16, low=-16, high=15),
        "q8_0": partial(_single, zero=128, low=-127, high=127),
        "iq4_nl": partial(_single, zero=0, low=1, high=0),
        "q4_1": _floor,
        "q5_1": _floor,
        "q2_k": partial(_offset, size=16, limit=15),
        "q4_k": partial(_offset, size=32, limit=63),
        "q5_k": partial(_offset, size=32, limit=63),
        "q3_k": partial(_signed, size=16, zero=4, levels=(-4, 3), scales=(-32, 31)),
        "q6_k": partial(_signed, size=16, zero=32, levels=(-32, 31), scales=(-128, 127)),
        "iq4_xs": partial(_signed, size=32, zero=0, levels=(1, 0), scales=(-32, 31)),
        **dict.fromkeys(("int2", "int3", "int4", "int8"), _integer),
    }
)
