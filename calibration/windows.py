"""What the model sees while it is calibrated: windows of token ids, equal for equal files, and the record that names them.

windows = make_windows("traces.jsonl:0.5,builtin:0.5", tokenizer, samples=128, length=512)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r1q.calibration.corpus import Taken, take
from r1q.calibration.shares import fill
from r1q.calibration.spec import Source, parse_spec
from r1q.core.errors import InputError, UsageError
from r1q.models.tokenizer import Tokenizer

Ids = NDArray[np.int64]
MAX_IDS = 1 << 24  # 8,192 windows of 2,048 tokens; as Python lists on the way, about 1 GB


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Token ids [samples, length], read-only, and what job.json and the manifest say of them (names, counts and hashes; no paths).

    The record: `tokens` (sha256 of the ids as little-endian int64), `samples` and `asked` (fewer where the text was too short),
    `length`, and `sources`: for each its `name`, `kind`, `share` of the windows asked for, `windows` it gave, `tokens` and `bytes`
    that were read from its start, whether that was the `whole` of it, and `sha256` of those bytes. A folder has its `files` instead
    of bytes and sha256.
    """

    tokens: Ids
    record: Mapping[str, object]


def make_windows(spec: str, tokenizer: Tokenizer, *, samples: int = 128, length: int = 512) -> Windows:
    """Return up to `samples` windows of `length` ids from the sources that `spec` names (`calibration/spec.py` says how).

    Nothing is drawn by chance. The stream of each source (`calibration/corpus.py`) is cut into windows that follow one another from
    its start; a rest shorter than a window is left. Where the tokenizer puts BOS before a text, it takes the place of every
    window's first id: one text gives the chunks that llama-imatrix and llama-perplexity make of the same file. Windows of a
    mixture are shared out by weight (what a short source lacks, the others give) and lie evenly among one another, so that
    any stretch of windows is the mixture again.

    Raises `UsageError` for a spec or numbers that make no sense, and `InputError` for a file that cannot be read as text, or where
    there is not text enough for one window.
    """
    if samples < 1 or length < 2 or samples * length > MAX_IDS:
        raise UsageError(
            f"{samples} windows of {length} tokens: there must be at least one window of two tokens, "
            f"and no more than {MAX_IDS} tokens"
        )
    sources = parse_spec(spec)
    held = [take(source.files, tokenizer, 0) for source in sources]

    def get(index: int, need: int) -> int:
        ids, taken = held[index]
        if len(ids) < need * length and not all(part.whole for part in taken):
            held[index] = take(sources[index].files, tokenizer, need * length)
        return min(need, len(held[index][0]) // length)

    counts = fill(samples, [source.share for source in sources], get)
    if not sum(counts):
        most = max(len(ids) for ids, _ in held)
        raise InputError(
            f"the calibration {spec!r} has {most} tokens, less than one window of {length}; give more text"
        )
    cut = [_cut(held[index][0], count, length) for index, count in enumerate(counts)]
    tokens = _interleaved(cut)
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        tokens[:, 0] = tokenizer.bos_id
    tokens.setflags(write=False)
    record = {
        "tokens": hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest(),
        "samples": len(tokens),
        "asked": samples,
        "length": length,
        "sources": [_described(source, counts[index], *held[index]) for index, source in enumerate(sources)],
    }
    return Windows(tokens=tokens, record=record)


def _cut(ids: Sequence[int], count: int, length: int) -> Ids:
    return np.array(ids[: count * length], dtype=np.int64).reshape(count, length)


def _interleaved(parts: Sequence[Ids]) -> Ids:
    """Return all windows in one array, those of each part at even distances; of equals, the first part's come first."""
    places = np.concatenate([(np.arange(len(part)) + 0.5) / max(len(part), 1) for part in parts])
    joined: Ids = np.concatenate(parts)[np.argsort(places, kind="stable")]
    return joined


def _described(source: Source, windows: int, ids: Sequence[int], taken: Sequence[Taken]) -> dict[str, object]:
    files = [
        {
            "name": part.name,
            "bytes": part.bytes,
            "sha256": part.sha256,
            "documents": part.documents,
            "whole": part.whole,
        }
        for part in taken
    ]
    entry: dict[str, object] = {"name": source.name, "kind": source.kind, "share": source.share, "windows": windows}
    if source.kind == "folder":
        return {**entry, "tokens": len(ids), "files": files, "ignored": source.ignored}
    return {**files[0], **entry, "tokens": sum(len(part.ids) for part in taken)}
