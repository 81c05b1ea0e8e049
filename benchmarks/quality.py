"""Fidelity, in children: perplexity, divergence and agreement on the same token windows, by llama-perplexity's convention.

The text is cut into windows of 512 tokens that do not overlap; the second half of each is scored: positions 256…510, 255 tokens.
Where the tokenizer adds a BOS, it stands before the text and replaces the first token of every window. The reference's logits are
computed once, in a process of their own, and lie on disk while every artifact is scored against them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError, ResourceError
from r1q.core.metrics import Logits, TokenScores, score
from r1q.runtimes.base import Options, Session
from r1q.runtimes.table import load_runtime

LENGTH = 512
CHEAP = 10**9  # weights: the noise floor of a smaller model takes seconds, that of a larger one minutes
SPARE = 256 << 20  # bytes of the disk that stay free beside the reference's logits


def cut(ids: Sequence[int], *, length: int, windows: int, bos: int | None) -> NDArray[np.int64]:
    """Return up to `windows` windows [windows, length] of `ids`, a text's tokens without BOS.

    Raises InputError where the text does not fill one.
    """
    stream = list(ids) if bos is None else [bos, *ids]
    count = min(windows, len(stream) // length)
    if count < 1:
        raise InputError(
            f"the text has {len(stream)} tokens and a window needs {length}: give a longer one with --text"
        )
    table = np.array(stream[: count * length], dtype=np.int64).reshape(count, length)
    if bos is not None:
        table[:, 0] = bos
    return table


def read_text(path: Path) -> str:
    """Return a text file's content. Raises InputError for one that cannot be read, is not UTF-8, or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): give another with --text"
        ) from error
    if not text.strip():
        raise InputError(f"{path} is empty: give another with --text")
    return text


def affordable(windows: int, window_bytes: int, *, limit: int, free: int) -> tuple[int, str]:
    """Return how many windows' logits of `window_bytes` each may lie on disk, and what sets that bound.

    Raises ResourceError if not one may.
    """
    room, bound = min(
        (limit, f"{limit >> 20} MiB is the limit"),
        (free - SPARE, f"{free >> 20} MiB are free in the temporary folder"),
    )
    if room < window_bytes:
        raise ResourceError(f"one window of reference logits needs {-(-window_bytes >> 20)} MiB on disk, and {bound}")
    return min(windows, room // window_bytes), bound


def reference(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Run the float checkpoint over the windows; the job: checkpoint, text, windows, logits, limit (bytes on disk), noise_floor.

    `logits` is the descriptor of an open file, into which go float32 [windows, scored, vocab]. Yields `reference`, the windows'
    facts and tokens; then each window's nll; then, for the noise floor, each window's scores of the same model rounded to bfloat16
    after every block. `noise_floor` None means that it is made where the model has fewer than 10⁹ weights: it costs as much again.
    """
    from r1q.models.source import ModelSource
    from r1q.models.tokenizer import Tokenizer

    source = ModelSource.open(Path(job["checkpoint"]))
    tokenizer = Tokenizer.open(source.path)
    length, vocab = min(LENGTH, source.config.max_position_embeddings), source.config.vocab_size
    ids = tokenizer.encode(read_text(Path(job["text"])), add_special=False)
    tokens = cut(ids, length=length, windows=job["windows"], bos=tokenizer.bos_id if tokenizer.adds_bos else None)
    first, found = length // 2, len(tokens)
    disk = os.fstatvfs(job["logits"])
    free = disk.f_bavail * disk.f_frsize
    kept, bound = affordable(found, 4 * (length - 1 - first) * vocab, limit=job["limit"], free=free)
    tokens = tokens[:kept]
    facts = {"length": length, "first": first, "windows": kept, "vocab": vocab, "tokens": tokens.tolist()}
    wanted = job.get("noise_floor")
    facts["noise_floor"] = sum(spec.size for spec in source.tensors) < CHEAP if wanted is None else wanted
    yield {"reference": {**facts, "notes": _notes(job, found, kept, bound)}}
    from r1q.models.forward import logits  # loads torch: not before it is known that there is something to do

    with _stream(job["logits"]) as file:
        # The last position predicts a token outside the window: it is left out.
        for window, rows in enumerate(logits(source, tokens[:, :-1], first=first)):
            _write(file, rows)
            yield {"window": window, **_scores(score(rows, tokens[window, first + 1 :]))}
    if facts["noise_floor"]:
        table = _read(job["logits"], facts)
        for window, rows in enumerate(logits(source, tokens[:, :-1], first=first, rounded=True)):
            yield {"floor": window, **_scores(score(rows, tokens[window, first + 1 :], table[window]))}


def scores(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Score one artifact; the job: path, runtime, options, text, windows, length, reference (its facts) or None, logits (its file).

    Without a reference the artifact's own tokenizer makes the windows. Yields `opened`, then each window's scores.
    """
    runtime, facts = load_runtime(job["runtime"]), job["reference"]
    with runtime.open(Path(job["path"]), Options(**job["options"])) as session:
        ids = session.encode(read_text(Path(job["text"])))
        if facts is None:
            tokens = cut(ids, length=job["length"], windows=job["windows"], bos=session.bos)
            notes = _notes(job, len(tokens), len(tokens))
        else:
            tokens = np.array(facts["tokens"], dtype=np.int64)
            notes = _compare(session, ids, tokens, facts["vocab"])
        table = None if facts is None else _read(job["logits"], facts)
        first = tokens.shape[1] // 2
        yield {"opened": {"windows": len(tokens), "length": tokens.shape[1], "first": first, "notes": notes}}
        for window, row in enumerate(tokens):
            rows = session.logits(row[:-1].tolist(), first=first)
            found = score(rows, row[first + 1 :], None if table is None else table[window])
            yield {"window": window, **_scores(found)}


def _stream(descriptor: int) -> BinaryIO:
    """Return the file from its beginning; the descriptor itself stays open."""
    file = os.fdopen(os.dup(descriptor), "r+b")
    file.seek(0)
    return file


def _write(file: BinaryIO, rows: Logits) -> None:
    # Written and not mapped: a disk that fills up is an error of write, but a signal that ends the process of a map.
    try:
        file.write(np.ascontiguousarray(rows).data)
        file.flush()
    except OSError as error:
        raise ResourceError(f"the reference's logits do not fit the temporary folder: {error.strerror}") from error


def _read(descriptor: int, facts: Mapping[str, Any]) -> Logits:
    """Return the logits [windows, scored, vocab] that `reference` wrote, mapped."""
    shape = (facts["windows"], facts["length"] - 1 - facts["first"], facts["vocab"])
    with _stream(descriptor) as file:
        return np.memmap(file, dtype=np.float32, mode="r", shape=shape)


def _compare(session: Session, ids: Sequence[int], tokens: NDArray[np.int64], vocab: int) -> list[str]:
    """Return a note where the artifact's tokenizer and the reference's disagree. Raises InputError where their vocabularies do."""
    if session.vocab != vocab:
        raise InputError(
            f"the artifact has {session.vocab} tokens and the reference {vocab}: they are not the same model; "
            "give the checkpoint that it was made from with --reference"
        )
    own = cut([*ids, *[0] * tokens.size], length=tokens.shape[1], windows=len(tokens), bos=session.bos)
    different = int((own != tokens).any(axis=1).sum())
    if not different:
        return []
    where = f"{different} of {len(tokens)} windows"
    return [f"the artifact's own tokenizer splits the text otherwise in {where}; the reference's was used"]


def _notes(job: Mapping[str, Any], found: int, kept: int, bound: str = "") -> list[str]:
    notes = []
    if found < job["windows"]:
        notes.append(f"the text fills {found} windows of the {job['windows']} asked for")
    if kept < found:
        notes.append(f"{kept} of {found} windows are scored: the reference's logits lie on disk, and {bound}")
    return notes


def _scores(found: TokenScores) -> dict[str, Any]:
    """Return scores as plain lists; nine digits tell every float32 apart and keep a JSON line readable."""
    return {
        "nll": [float(f"{value:.9g}") for value in found.nll],
        "kld": None if found.kld is None else [float(f"{value:.9g}") for value in found.kld],
        "same_top": None if found.same_top is None else found.same_top.tolist(),
    }
