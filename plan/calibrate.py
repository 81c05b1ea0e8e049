"""`r1q calibrate` from end to end: text, one pass of the float model, an importance matrix in llama.cpp's form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from r1q.core.errors import UsageError
from r1q.models.embedded import open_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What `r1q calibrate` is asked; `model` None is the embedded one, `process_output` takes the head in, as llama-imatrix does."""

    output: Path
    model: str | None = None
    calibration: str = "builtin"
    samples: int = 128
    seq_len: int = 512
    process_output: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How far the pass is: `blocks` of `all_blocks`; at the end `path`, the `entries` in it and the `windows` that went in.

    `unseen` of `experts` were sent no token.
    """

    blocks: int
    all_blocks: int
    path: Path | None = None
    entries: int = 0
    windows: int = 0
    experts: int = 0
    unseen: int = 0


def calibrate_model(asked: Statistics, *, progress: bool = False) -> Iterator[Done]:
    """Write the importance matrix, yielding after every block (`progress` shows a download).

    Raises `UsageError` for an output without a name, and what the model, the text and the disk raise.
    """
    from r1q.calibration.columns import column_sums
    from r1q.calibration.imatrix import write_imatrix
    from r1q.calibration.windows import make_windows
    from r1q.models.tokenizer import Tokenizer

    if asked.output.is_dir():
        raise UsageError(f"{asked.output} is a folder; name a file, such as {asked.output / 'stats.gguf'}")
    source = open_model(asked.model, progress=progress).source
    windows = make_windows(asked.calibration, Tokenizer.open(source.path), samples=asked.samples, length=asked.seq_len)
    sums, layers = {}, source.config.num_layers
    seen: dict[str, list[int]] = {}
    found_sums = column_sums(source, windows.tokens, head=asked.process_output, seen=seen)
    for number, found in enumerate(found_sums, start=1):
        sums.update(found)
        yield Done(blocks=min(number, layers), all_blocks=layers)
    names = [str(entry["name"]) for entry in _sources(windows.record)]
    count = int(windows.tokens.size)
    write_imatrix(
        asked.output,
        sums,
        {name: seen.get(name, count) for name in sums},
        datasets=names,
        chunks=len(windows.tokens),
        chunk_size=asked.seq_len,
    )
    counts = [tokens for name, tokens_of in seen.items() if "ffn_down" in name for tokens in tokens_of]
    yield Done(
        blocks=layers,
        all_blocks=layers,
        path=asked.output,
        entries=len(sums),
        windows=len(windows.tokens),
        experts=len(counts),
        unseen=counts.count(0),
    )


def _sources(record: object) -> list[dict[str, object]]:
    sources = record.get("sources") if hasattr(record, "get") else None
    return list(sources) if isinstance(sources, list | tuple) else []
