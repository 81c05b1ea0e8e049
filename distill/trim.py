"""r1q trim: a model with the tokens alone that a corpus uses; the rows of the others leave embedding and head, the rest stays as is.

Logits of kept tokens are what they were; probabilities are shared out among fewer. The result is a Hugging Face folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jinja2 import nodes
from numpy.typing import NDArray

from r1q.calibration.corpus import _document, _lines
from r1q.calibration.spec import KINDS, parse_spec
from r1q.core.errors import CheckError, InputError, UsageError
from r1q.core.files import TEMP_PREFIX, atomic_write, json_bytes, remove_leftovers, write_json, writing
from r1q.core.hf_folder import INDEX, contained, open_weights, read_json
from r1q.core.safetensors_file import Array, SafetensorsFile, write_safetensors
from r1q.distill.vocabulary import check_kind, kept_ids, settings_ids, trimmed_settings, trimmed_tokenizer
from r1q.models.families import FLOAT_DTYPES
from r1q.models.source import ModelSource, sidecar_files
from r1q.models.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer

RECORD = "trim.json"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
_VOCABULARY_ENDS = ("embed_tokens.weight", "lm_head.weight", "shared_head.head.weight")
_ROWS = 2048
_CHUNK = 8 << 20
_PIECE = 1 << 20  # characters that are cut into tokens at a time
_OVERLAP = 1 << 12  # so many of the piece before are seen again: no word is lost where pieces meet
_SAMPLE = ({"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Trimmed:
    """What became of a model: tokens and bytes of weights before and after; `already`: it was there."""

    path: Path
    tokens: tuple[int, int]
    bytes: tuple[int, int]
    corpus_tokens: int
    already: bool = False


def trim_vocabulary(source: ModelSource, corpus: str, output: Path) -> Trimmed:
    """Write to `output` the model with the tokens alone that `corpus` (as `--calibration` says it) and the model itself need.

    Before a weight is written, the new tokenizer must cut the whole corpus into the same tokens as the old one (`CheckError`).
    Raises `InputError` for a tokenizer that is not byte-level BPE, `UsageError` for a folder that holds something else.
    """
    where = contained(source.path, TOKENIZER)
    old = Tokenizer.open(source.path)
    data = _read_tokenizer(where)
    check_kind(data, where)
    files = [path for part in parse_spec(corpus) for path in part.files]
    seen = np.zeros(source.config.vocab_size, dtype=np.bool_)
    count, digest = 0, hashlib.sha256()
    for ids in _pieces(files, old):
        if ids and max(ids) >= len(seen):
            raise InputError(f"{where} gives the id {max(ids)}, and the embedding has {len(seen)} rows")
        seen[ids] = True
        count += len(ids)
        digest.update(np.asarray(ids, dtype="<i8").tobytes())
    seen[[number for text in _template_texts(old) for number in old.encode(text, add_special=True)]] = True
    kept = kept_ids(data, [*np.flatnonzero(seen).tolist(), *_named_ids(source, len(seen))], where)
    if kept[-1] >= len(seen):
        raise InputError(
            f"{where} has the token {kept[-1]}, and the embedding {len(seen)} rows; the two do not belong together"
        )
    new = {number: place for place, number in enumerate(kept)}
    record = {"format": 1, "source": source.fingerprint(), "corpus": digest.hexdigest(), "kept": kept}
    already = _begin(output, record)
    if not already:
        _write_tokenizer(source.path, output, trimmed_tokenizer(data, new, where), new)
        _prove(files, old, Tokenizer.open(output), new)
        _write_weights(source.path, output, np.array(kept), len(seen))
        for name in ("generation_config.json", CONFIG):  # config.json last: without it the folder is no model
            if (source.path / name).is_file():
                write_json(output / name, trimmed_settings(read_json(source.path / name), new))
    sizes = _weight_bytes(source.path), _weight_bytes(output)
    return Trimmed(path=output, tokens=(len(seen), len(kept)), bytes=sizes, corpus_tokens=count, already=already)


def _read_tokenizer(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise InputError(f"{path} has more than {MAX_TOKENIZER_BYTES} bytes; that is no tokenizer")
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))  # Tokenizer.open has read it whole
    return data


def _pieces(files: Sequence[Path], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Yield the ids of every document; a long text comes in pieces that overlap."""
    for path in files:
        if KINDS[path.suffix.lower()] == "text":
            for text in _texts(path):
                yield tokenizer.encode(text, add_special=True)
        else:
            for number, line in _lines(path):
                if line.strip():
                    yield _document(line, tokenizer, f"{path}, line {number}")


def _texts(path: Path) -> Iterator[str]:
    """Yield a text in pieces that begin a little before the end of the one before."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            tail = ""
            while piece := file.read(_PIECE):
                yield tail + piece
                tail = piece[-_OVERLAP:]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None


def _template_texts(tokenizer: Tokenizer) -> list[str]:
    """Return all text that the chat template can write by itself, and a conversation in it."""
    if tokenizer.chat_template is None:
        return []
    try:
        texts = [tokenizer.render_chat(_SAMPLE), tokenizer.render_chat(_SAMPLE[1:2])]
    except InputError:  # a template may refuse a system message; its texts are taken apart below
        texts = []
    tree = jinja2.Environment(autoescape=False).parse(tokenizer.chat_template)  # parsed, never run
    texts += [node.data for node in tree.find_all(nodes.TemplateData)]
    return [*texts, *(str(node.value) for node in tree.find_all(nodes.Const) if isinstance(node.value, str))]


def _named_ids(source: ModelSource, rows: int) -> list[int]:
    named: list[int] = []
    for name in (CONFIG, "generation_config.json"):
        if (source.path / name).is_file():
            named += settings_ids(read_json(source.path / name))
    if named and max(named) >= rows:
        raise InputError(
            f"{source.path}: config.json or generation_config.json names the token {max(named)} of {rows}; mend it"
        )
    return named


def _begin(output: Path, record: Mapping[str, object]) -> bool:
    """Fix in `output` what is to be made; return whether it is finished. Raises `UsageError` where something else is there."""
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output)
        there = [path.name for path in output.iterdir() if not path.name.startswith(TEMP_PREFIX)]
    if not there:
        write_json(output / RECORD, record)
        return False
    if RECORD not in there or (output / RECORD).read_bytes() != json_bytes(record):
        raise UsageError(f"{output} holds something else; choose another folder with -o")
    return CONFIG in there


def _write_tokenizer(folder: Path, output: Path, data: Mapping[str, Any], new: Mapping[int, int]) -> None:
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    whole: dict[str, object] = {TOKENIZER: data, "vocab.json": data["model"]["vocab"], "added_tokens.json": added}
    for path in sidecar_files(folder):
        contained(folder, path.name)
        if path.name in whole:
            content = json.dumps(
                whole[path.name], ensure_ascii=False, indent=1
            ).encode()  # the order of a vocabulary stays
        elif path.name == "merges.txt":
            content = ("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges)).encode()
        elif path.name == "tokenizer_config.json":
            settings = trimmed_settings(read_json(path), new)
            content = json.dumps(settings, ensure_ascii=False, indent=2).encode()
        elif path.name in (CONFIG, "generation_config.json", "tokenizer.model"):
            continue
        else:
            content = path.read_bytes()
        with atomic_write(output / path.name) as file:
            file.write(content)


def _prove(files: Sequence[Path], old: Tokenizer, trimmed: Tokenizer, new: Mapping[int, int]) -> None:
    for before, after in zip(_pieces(files, old), _pieces(files, trimmed), strict=True):
        if [new[number] for number in before] != after:
            raise CheckError(
                f"{trimmed.folder}: the trimmed tokenizer cuts the corpus otherwise; this tokenizer cannot be trimmed"
            )


def _write_weights(folder: Path, output: Path, kept: NDArray[np.int64], rows: int) -> None:
    tensors = open_weights(folder)
    for file in dict.fromkeys(tensors.values()):
        if not (output / file.path.name).exists():  # renamed into place when whole
            _write_file(file, output / file.path.name, kept, rows)
    if not (folder / "model.safetensors").exists():
        total = sum(entry.stop - entry.start for path in output.glob("*.safetensors") for entry in _entries(path))
        weight_map = {name: file.path.name for name, file in tensors.items()}
        write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _entries(path: Path) -> list[Any]:
    with SafetensorsFile.open(path) as file:
        return list(file.tensors.values())


def _write_file(file: SafetensorsFile, path: Path, kept: NDArray[np.int64], rows: int) -> None:
    cut = {
        name
        for name, entry in file.tensors.items()
        if name.endswith(_VOCABULARY_ENDS) and len(entry.shape) == 2 and entry.shape[0] == rows
    }
    for name in cut:
        if file.tensors[name].dtype not in FLOAT_DTYPES:
            raise InputError(f"{file.path}: {name} is stored as {file.tensors[name].dtype}, whose rows share scales")
    shapes = [
        (name, entry.dtype, (len(kept), entry.shape[1]) if name in cut else entry.shape)
        for name, entry in file.tensors.items()
    ]
    write_safetensors(path, shapes, _chunks(file, cut, kept), file.metadata)


def _chunks(file: SafetensorsFile, cut: set[str], kept: NDArray[np.int64]) -> Iterator[Array]:
    for name, entry in file.tensors.items():
        if not entry.shape or entry.start == entry.stop:
            yield file.read(name)
            continue
        rows = int(np.prod(entry.shape[:-1]))
        step = _ROWS if name in cut else max(1, _CHUNK * rows // (entry.stop - entry.start))
        for start in range(0, rows, step):
            values = file.read_flat_rows(name, start, min(start + step, rows))
            if name in cut:
                low, high = np.searchsorted(kept, [start, start + step])
                values = values[kept[low:high] - start]
            yield values


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
