"""How llama.cpp fits each of its block types, bit for bit: weights in, codes and scales out.

A grid is one table row: the function that fits it without importance, the one with, and the numbers that set it apart from its kin.
Kernels are compiled when first used and kept on disk, so a run pays only for the grids it uses, once a machine.
The bytes are those of llama.cpp built for x86-64 without fused multiply-add, as its `libggml-base` is.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from r1q.core.blocks import LAYOUTS
from r1q.core.scheme import GRIDS

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

# A slab of this many weights takes milliseconds: long against starting it, short against a tensor.
_SLAB_WEIGHTS = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One row of the table: functions `plain` and `weighted` of `module`, each called with its own last arguments.

    `weighted` is None where llama.cpp ignores importance.
    """

    module: str
    plain: str
    plain_with: tuple[object, ...]
    weighted: str | None
    weighted_with: tuple[object, ...] = ()


def _search(module: str, plain: str, plain_with: tuple[object, ...], weighted: str | None, *more: object) -> Search:
    return Search(module=module, plain=plain, plain_with=plain_with, weighted=weighted, weighted_with=more)


SEARCHES: Mapping[str, Search] = MappingProxyType(
    {
        "q4_0": _search("simple_blocks", "signed_plain", (8,), "signed_weighted", 8),
        "q4_1": _search("simple_blocks", "offset_plain", (15,), "offset_weighted", 15),
        "q5_0": _search("simple_blocks", "signed_plain", (16,), "signed_weighted", 16),
        "q5_1": _search("simple_blocks", "offset_plain", (31,), "offset_weighted", 31),
        "q8_0": _search("simple_blocks", "bytes_plain", (127,), None),
        "q2_k": _search("offset_super_blocks", "plain", (3, np.float32(-0.5), 15), "weighted", 3),
        "q4_k": _search("offset_super_blocks", "plain", (15, np.float32(-1.0), 20), "weighted", 15),
        "q5_k": _search("offset_super_blocks", "plain", (31, np.float32(-0.5), 15), "weighted", 31),
        "q3_k": _search("symmetric_super_blocks", "q3_plain", (), "q3_weighted"),
        "q6_k": _search("symmetric_super_blocks", "q6_plain", (), "q6_weighted"),
        "iq4_nl": _search("codebook_blocks", "lone_plain", (), "lone_weighted"),
        "iq4_xs": _search("codebook_blocks", "joined_plain", (), "joined_weighted"),
    }
)


def quantize_rows(
    grid: str, weights: Floats, importance: Floats | None, *, threads: int | None = None
) -> tuple[Codes, dict[str, NDArray[np.generic]]]:
    """Return the codes [rows, cols] and params that llama.cpp's own search finds for `weights` [rows, cols].

    `importance` [cols] is how much an error in each column weighs (the mean square of what the column is multiplied with);
    None searches without it, and q8_0 never looks at it. `threads` is how many cores work, all of them if None; rows are fitted
    independently, so it does not change a byte. Params are those of `core/blocks.py`; a weight too large for a float16 scale
    leaves an infinite one there, as in llama.cpp, for the caller to refuse. Raises ValueError where a shape or dtype is wrong.
    """
    _check(grid, weights, importance)
    rows, columns = weights.shape
    blocks = columns // GRIDS[grid].block
    codes = np.zeros((rows, columns), dtype=np.uint8)
    fields = {name: _empty(param.dtype, rows, blocks * param.entries) for name, param in LAYOUTS[grid].params.items()}
    search = SEARCHES[grid]
    module = importlib.import_module(f"{__name__}.{search.module}")
    inputs: tuple[Floats, ...] = ()
    name, last = search.plain, search.plain_with
    if importance is not None and search.weighted is not None:
        inputs, name, last = (np.ascontiguousarray(importance),), search.weighted, search.weighted_with
    fit: Callable[..., None] = getattr(module, name)
    step = max(1, _SLAB_WEIGHTS // max(columns, 1))

    def fit_slab(first: int) -> None:
        slab = slice(first, first + step)
        fit(weights[slab], *inputs, codes[slab], *(array[slab] for array in fields.values()), *last)

    _on_all(fit_slab, range(0, rows if columns else 0, step), threads)
    params = {name: fields[name].view(param.dtype) for name, param in LAYOUTS[grid].params.items()}
    return codes, params


def _empty(dtype: np.dtype[np.generic], rows: int, entries: int) -> NDArray[np.generic]:
    """Return room for a field; halves as their bits, since compiled code knows no float16."""
    return np.zeros((rows, entries), dtype=np.uint16 if dtype == np.float16 else dtype)


def _on_all(work: Callable[[int], None], slabs: range, threads: int | None) -> None:
    """Run `work` for every slab, on threads of our own: numba's default thread pool must not be entered twice at once."""
    workers = min(len(slabs), threads or _cores())
    if workers <= 1:
        for first in slabs:
            work(first)
        return
    work(slabs[0])  # compiles, so that the threads do not all wait for it
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, slabs[1:]):
            pass


def _cores() -> int:
    """Return how many cores this process may use, where the system says; macOS and Windows do not."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(grid: str, weights: Floats, importance: Floats | None) -> None:
    """Raise ValueError unless the arrays are what the kernels were compiled for."""
    if grid not in SEARCHES:
        raise ValueError(f"{grid!r} is not a ggml block type ({', '.join(SEARCHES)})")
    block = GRIDS[grid].block
    if weights.dtype != np.float32 or weights.ndim != 2 or weights.shape[1] % block or not weights.flags.c_contiguous:
        raise ValueError(f"{grid} fits contiguous float32 [rows, n · {block}], not {weights.dtype} {weights.shape}")
    if importance is not None and (importance.dtype != np.float32 or importance.shape != weights.shape[1:]):
        raise ValueError(f"importance is float32 {weights.shape[1:]}, not {importance.dtype} {importance.shape}")
