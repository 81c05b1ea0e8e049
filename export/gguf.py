"""A QuantizedCheckpoint as one GGUF file: codes are copied, never made again; one slab of rows is in memory at a time.

Tensors stand in the checkpoint's order (embedding, blocks, norm, head), under llama.cpp's names. Matrices keep the grid they
have; vectors are float32. Llama's q and k change their row order (`export/rope.py`), which moves packed rows whole; experts of a
block become one tensor (`export/gguf_moe.py`).
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from r1q import __version__
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError, UsageError
from r1q.core.files import TEMP_PREFIX, atomic_write
from r1q.core.gguf_types import DEFAULT_ALIGNMENT, SCALARS, TENSOR_TYPE_NUMBERS
from r1q.core.recipe import PlannedTensor
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.export.gguf_metadata import (
    Entry,
    architecture_entries,
    file_entries,
    file_name,
    general_entries,
    is_r1_template,
    name_model,
    provenance_entries,
    read_generation,
)
from r1q.export.gguf_moe import Stack, refuse_otherwise, stacked
from r1q.export.gguf_tokenizer import tokenizer_entries
from r1q.export.pretokenizer import name_pretokenizer, prove_tokenizer
from r1q.export.rope import frequency_factors, interleave_heads, is_permuted
from r1q.models.config import ModelConfig
from r1q.models.tokenizer import Tokenizer

SLAB_BYTES = 1 << 25
_FACTORS = "rope_freqs.weight"
_STRING = 8  # GGUF's number for a string value


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufLayout:
    """Everything a file will hold but the weights: where each tensor comes from, and every metadata entry."""

    architecture: str
    file_name: str
    entries: tuple[Entry, ...]
    tensors: tuple[Stack, ...]
    factors: NDArray[np.float32] | None
    head_dim: int


def write_gguf(checkpoint: QuantizedCheckpoint, folder: Path) -> Path:
    """Write `checkpoint` into `folder` under its GGUF name and return the file's path. Atomic; equal input gives equal bytes.

    Raises `InputError` for a tokenizer that a GGUF cannot carry, `UsageError` for a grid it cannot hold, and the errors of
    `core.files` for a disk that is full or not writable.
    """
    layout = plan_gguf(checkpoint)
    path = folder / layout.file_name
    with atomic_write(path) as file:
        _write_header(file, layout)
        for chunk in _data(checkpoint, layout):
            file.write(chunk)
    return path


def plan_gguf(checkpoint: QuantizedCheckpoint) -> GgufLayout:
    """Return what `write_gguf` will write, without reading weights; raises what it raises."""
    tensors = [(spec, checkpoint.scheme(spec.name)) for spec in checkpoint.tensors]
    return _layout(checkpoint.sidecar, checkpoint.model_name, checkpoint.recipe_name, tensors, checkpoint.manifest)


def file_bytes(folder: Path, planned: Sequence[PlannedTensor], model: str, recipe: str) -> int:
    """Return how many bytes the GGUF file of the model in `folder` will have, to the byte but for the length of r1q's version."""
    tensors = [(tensor.spec, tensor.scheme) for tensor in planned]
    layout = _layout(folder, model, recipe, tensors, {"versions": {"r1q": __version__}})
    with tempfile.TemporaryFile() as file:
        _write_header(file, layout)
        header = file.tell()
    sizes = [int(np.prod(s[:-1], dtype=np.int64)) * scheme.row_bytes(s[-1]) for _, s, scheme in _described(layout)]
    return header + sum(-(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT for size in sizes)


def _layout(
    sidecar: Path,
    model: str,
    recipe: str,
    schemes: Sequence[tuple[TensorSpec, Scheme]],
    manifest: Mapping[str, object],
) -> GgufLayout:
    config = ModelConfig.read(sidecar, name=model)
    tensors = tuple(schemes)
    _check_tensors(sidecar, tensors, config)
    refuse_otherwise(config, model)
    tokenizer = Tokenizer.open(sidecar)
    names = name_model(model, sum(spec.size for spec, _ in tensors), sidecar)
    entries = (
        *general_entries(names, read_generation(sidecar), is_r1_template(tokenizer.chat_template)),
        *architecture_entries(config),
        *file_entries(recipe, tensors),
        *tokenizer_entries(sidecar, config.vocab_size, name_pretokenizer(sidecar, tokenizer), tokenizer),
        *provenance_entries(manifest, recipe),
    )
    return GgufLayout(
        architecture=config.architecture,
        file_name=file_name(names, re.sub(r"\W+", "_", recipe or "mixed").upper()),
        entries=entries,
        tensors=stacked(tensors, config),
        factors=frequency_factors(config),
        head_dim=config.head_dim,
    )


def prove_source(folder: Path) -> str:
    """Prove the tokenizer of a model folder before anything is quantized, on a file without weights; see `prove_tokenizer`.

    Hours of work need not end at a tokenizer that llama.cpp reads differently.
    """
    config, tokenizer = ModelConfig.read(folder), Tokenizer.open(folder)
    refuse_otherwise(config, str(folder))
    pre = name_pretokenizer(folder, tokenizer)
    entries = (*architecture_entries(config), *tokenizer_entries(folder, config.vocab_size, pre, tokenizer))
    layout = GgufLayout(
        architecture=config.architecture,
        file_name="",
        entries=entries,
        tensors=(),
        factors=None,
        head_dim=config.head_dim,
    )
    with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX) as place:
        path = Path(place) / "vocabulary.gguf"
        with atomic_write(path) as file:
            _write_header(file, layout)
        return prove_tokenizer(path, folder)


def _check_tensors(path: Path, tensors: Sequence[tuple[TensorSpec, Scheme]], config: ModelConfig) -> None:
    for spec, scheme in tensors:
        if scheme.grid not in TENSOR_TYPE_NUMBERS:
            raise UsageError(
                f"{spec.name} is {scheme}, which a GGUF file cannot hold; quantize with one of GGUF's own grids"
            )
        if not scheme.divides(spec.columns):
            raise InputError(f"{path}: rows of {spec.name} ({spec.columns}) do not split into {scheme.grid} blocks")
        if spec.kind == "token_embd" and spec.rows != config.vocab_size:
            raise InputError(f"{path}: {spec.name} has {spec.rows} rows for the vocabulary of {config.vocab_size}")


def _stored(spec: TensorSpec, scheme: Scheme) -> Scheme:
    """Return the scheme in the file: vectors are float32 whatever the checkpoint keeps."""
    return scheme if spec.is_matrix else Scheme(grid="f32")


def _write_header(file: BinaryIO, layout: GgufLayout) -> None:
    """Write magic, metadata and tensor descriptions through gguf's writer, up to the aligned start of the data."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.gguf_writer import WriterState

    writer = GGUFWriter(None, layout.architecture)
    for entry in layout.entries:
        _add(writer, entry)
    for name, shape, scheme in _described(layout):
        size = int(np.prod(shape[:-1], dtype=np.int64)) * scheme.row_bytes(shape[-1])
        kind = GGMLQuantizationType(TENSOR_TYPE_NUMBERS[scheme.grid])
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    # Handing the writer an open file instead of a path keeps the atomic rename ours.
    writer.fout, writer.state = [file], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))


def _add(writer: Any, entry: Entry) -> None:
    from gguf import GGUFValueType

    element = entry.type.removeprefix("arr[").removesuffix("]")
    numbers = {name: number for number, (name, _) in SCALARS.items()} | {"str": _STRING}
    kind = GGUFValueType(numbers[element])
    if element == entry.type:
        writer.add_key_value(entry.key, entry.value, kind)
    else:
        writer.add_key_value(entry.key, entry.value, GGUFValueType.ARRAY, sub_type=kind)


def _described(layout: GgufLayout) -> Iterator[tuple[str, tuple[int, ...], Scheme]]:
    if layout.factors is not None:
        yield _FACTORS, layout.factors.shape, Scheme(grid="f32")
    for stack in layout.tensors:
        yield stack.name, stack.shape, _stored(stack.specs[0], stack.scheme)


def _data(checkpoint: QuantizedCheckpoint, layout: GgufLayout) -> Iterator[bytes]:
    """Yield the data section in order, each tensor padded to the alignment."""
    if layout.factors is not None:
        yield from _padded(iter([layout.factors.astype("<f4").tobytes()]))
    for stack in layout.tensors:
        rows = (_rows(checkpoint, spec, stack.scheme, layout) for spec in stack.specs)
        yield from _padded(itertools.chain.from_iterable(rows))


def _padded(chunks: Iterator[bytes]) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        yield chunk
    yield bytes(-size % DEFAULT_ALIGNMENT)


def _rows(checkpoint: QuantizedCheckpoint, spec: TensorSpec, scheme: Scheme, layout: GgufLayout) -> Iterator[bytes]:
    """Yield a tensor's stored rows, a slab at a time; slabs of permuted tensors hold whole heads."""
    permuted = is_permuted(layout.architecture, spec)
    if not spec.is_matrix:
        values: NDArray[Any] = np.asarray(checkpoint.read_rows(spec.name, 0, 1), dtype="<f4").reshape(-1)
        yield (interleave_heads(values, layout.head_dim) if permuted else values).tobytes()
        return
    step = max(1, SLAB_BYTES // scheme.row_bytes(spec.columns))
    if permuted:
        step = max(1, step // layout.head_dim) * layout.head_dim
    for start in range(0, spec.rows, step):
        packed: NDArray[Any] = checkpoint.packed_rows(spec.name, start, min(start + step, spec.rows))
        yield (interleave_heads(packed, layout.head_dim) if permuted else packed).tobytes()
