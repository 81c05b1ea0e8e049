"""What is fuzzed: each target takes bytes as one kind of file, reads it, and checks whatever it accepted.

Only the target's own refusal (`InputError`; for job.json `UsageError`) may come out of `feed`; any other exception, a warning
that became one included, is a finding. Tests replay findings through the same functions.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError, UsageError
from r1q.core.gguf_file import GgufFile, Strings
from r1q.core.imatrix_file import read_imatrix
from r1q.core.journal import finished_files, open_job
from r1q.core.mixtures import ModelShape
from r1q.core.recipe import Recipe, resolve
from r1q.core.safetensors_file import SafetensorsFile, write_safetensors
from r1q.core.tensors import TensorSpec
from r1q.models.source import ModelSource
from r1q.plan.inspect import inspect_path
from r1q.plan.render_inspect import show_inspection


class BrokenPromiseError(Exception):
    """A reader accepted a file and then said something of it that is not so."""


@dataclass(frozen=True, slots=True)
class Target:
    """Bytes become `file` in a folder that `prepare` filled; `read` gets the path of that file."""

    file: str
    read: Callable[[Path], None]
    prepare: Callable[[Path], None] = lambda folder: None
    refusal: type[Exception] = InputError


def feed(target: Target, folder: Path, data: bytes) -> bool:
    """Read `data` as the target's file in `folder`; return whether it was accepted. What it raises is a finding."""
    path = folder / target.file
    path.unlink(missing_ok=True)  # a new file: a map of the one before may still be alive
    path.write_bytes(data)
    try:
        target.read(path)
    except target.refusal as error:
        promise(str(folder) in str(error), f"a refusal that names no file: {error}")
        return False
    return True


def promise(kept: bool, what: str) -> None:
    """Raise unless a promise was kept (an assert would vanish under -O)."""
    if not kept:
        raise BrokenPromiseError(what)


def _safetensors(path: Path) -> None:
    size = path.stat().st_size
    with SafetensorsFile.open(path) as file:
        for name, entry in file.tensors.items():
            promise(8 <= entry.start <= entry.stop <= size, f"{name} lies outside of the file")
            values = file.read(name)
            promise(
                values.nbytes == entry.stop - entry.start and values.shape == entry.shape, f"{name} has another size"
            )
            if entry.shape and entry.shape[0]:
                last = file.read_rows(name, entry.shape[0] - 1, entry.shape[0])
                promise(last.tobytes() == values[-1:].tobytes(), f"the last row of {name} is another")
        file.sampled_sha256()


def _gguf(path: Path) -> None:
    file = GgufFile.open(path)
    promise(isinstance(file.architecture, str), "the architecture is no text")
    for name, tensor in file.tensors.items():
        stored = file.read_bytes(name)
        promise(
            stored.nbytes == tensor.nbytes and tensor.offset % file.alignment == 0, f"{name} has another size or place"
        )
        promise(file.read_rows(name, 0, 1).size * tensor.rows == tensor.nbytes, f"{name} has other rows")
    for key, value in file.metadata.items():
        if isinstance(value, Strings):
            promise(len(list(value.stored())) == len(value), f"{key} has another length")
            list(value)


def _imatrix(path: Path) -> None:
    found = read_imatrix(path)
    promise(type(found.chunks) is int and found.chunks >= 0, f"chunks are {found.chunks!r}")
    promise(len(found.columns) > 0, "no entry")
    for name, values in found.columns.items():
        promise(values.dtype == np.float32 and values.ndim == 1 and len(values) > 0, f"{name} is no row of float32")
        promise(bool(np.isfinite(values).all() and (values >= 0).all()), f"{name} is not finite and non-negative")


def _source(path: Path) -> None:
    source = ModelSource.open(path.parent)
    for spec in source.tensors:
        promise(source.read_rows(spec.name, 0, 1).size == spec.columns, f"{spec.name} has another row length")
    source.fingerprint()


_ROWS = TensorSpec(
    name="model.layers.0.mlp.down_proj.weight", kind="ffn_down", layer=0, part="weight", shape=(2, 512), dtype="F32"
)


def _recipe(path: Path) -> None:
    recipe = Recipe.load(str(path))
    for rule in recipe.rules:
        str(rule.scheme)
    promise(
        Recipe.from_dict(recipe.to_dict(), default_name="x", where=str(path)) == recipe, "not the same when read back"
    )
    try:
        planned = resolve(recipe, [_ROWS], ModelShape(family="llama", layers=1, heads=2, kv_heads=1, tied=False))
    except UsageError:
        return  # a rule that fits no tensor of this model: not the file's fault
    promise(all(tensor.bytes > 0 and str(tensor.scheme) != "" for tensor in planned), "a tensor of no bytes")


def _manifest(path: Path) -> None:
    checkpoint = QuantizedCheckpoint.open(path.parent)
    promise(isinstance(checkpoint.recipe_name + checkpoint.model_name, str), "names are no text")
    checkpoint.damaged_files()
    for name, record in checkpoint.records.items():
        promise(bool(str(record.scheme)) and record.spec.size >= 0, f"{name} has no size")
        row = checkpoint.read_rows(name, 0, 1)
        promise(row.size == record.spec.columns, f"{name} has another row length")


def _journal(path: Path) -> None:
    for name, entry in finished_files(path.parent).items():
        promise(name == entry.file and "/" not in name, f"{name} is no file of the folder")


def _job(path: Path) -> None:
    open_job(path.parent, {"seed": 0, "recipe": {"name": "q4_0"}})


def _artifacts(path: Path) -> None:
    output = OutputFolder(path.parent)
    output.artifacts()
    for artifact in output.listed().values():
        promise(
            f"{artifact.bytes / 1e6:.1f}" != "" and "/" not in artifact.name, "no size, or a name outside of the folder"
        )
        promise(all(isinstance(note, str) for note in artifact.notes), "a note that is no text")


def _inspected(path: Path) -> None:
    from rich.console import Console

    real = path.with_suffix(".gguf" if path.read_bytes()[:4] == b"GGUF" else ".safetensors")
    path.replace(real)
    found = inspect_path(real)
    json.dumps(found.to_dict(), allow_nan=False)
    show_inspection(Console(file=io.StringIO(), width=100), found, tensors=True, template=True)


HIDDEN, INNER, VOCABULARY, HEAD = 8, 12, 10, 4
_SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "model.layers.0.input_layernorm.weight": (HIDDEN,),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
    "model.layers.0.mlp.gate_proj.weight": (INNER, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (INNER, HIDDEN),
    "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    "model.layers.0.self_attn.k_proj.weight": (HEAD, HIDDEN),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (HEAD, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCABULARY, HIDDEN),
}
CONFIG: Mapping[str, object] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": HEAD, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 32},
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": [2, 3],
}  # fmt: skip
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WEIGHT_MAP: Mapping[str, str] = {name: SHARDS[name > "model.layers.0.o"] for name in _SHAPES}


def _prepare_model(folder: Path) -> None:
    """Write a one-layer Llama in two shards."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": WEIGHT_MAP}))
    for shard in SHARDS:
        names = [name for name, file in WEIGHT_MAP.items() if file == shard]
        data = [np.linspace(-1, 1, math.prod(_SHAPES[name]), dtype=np.float32) for name in names]
        write_safetensors(folder / shard, [(name, "F32", _SHAPES[name]) for name in names], data)


BLOCK_FILE = "block-00000.safetensors"


def _prepare_checkpoint(folder: Path) -> None:
    """Write one block file: a matrix of q8_0 rows and a vector."""
    rows = np.tile(np.frombuffer(b"\x00\x3c" + bytes(range(32)), dtype=np.uint8), (2, 1))
    write_safetensors(folder / BLOCK_FILE, [("v", "F32", (4,)), ("w", "U8", (2, 34))], [np.ones(4, np.float32), rows])
    (folder / "x.gguf").write_bytes(b"GGUF")


TARGETS: Mapping[str, Target] = {
    "safetensors": Target("x.safetensors", _safetensors),
    "gguf": Target("x.gguf", _gguf),
    "imatrix": Target("x.imatrix", _imatrix),
    "config": Target("config.json", _source, _prepare_model),
    "generation": Target("generation_config.json", _source, _prepare_model),
    "index": Target("model.safetensors.index.json", _source, _prepare_model),
    "recipe": Target("x.toml", _recipe),
    "manifest": Target("manifest.json", _manifest, _prepare_checkpoint),
    "journal": Target("journal.jsonl", _journal, _prepare_checkpoint),
    "job": Target("job.json", _job, refusal=UsageError),
    "artifacts": Target("artifacts.json", _artifacts, _prepare_checkpoint),
    "inspect": Target("x.any", _inspected),
}


def make_folder(target: Target, parent: Path) -> Path:
    """Return a fresh prepared folder for `target` under `parent`."""
    folder = parent / f"{target.file}-{os.getpid()}"
    folder.mkdir(parents=True)
    target.prepare(folder)
    return folder
