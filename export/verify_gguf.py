"""A written GGUF file against its checkpoint: what llama.cpp will read, held tensor by tensor against what was quantized.

Nothing of the writer is used. Names come from gguf's table for the architecture, weights from gguf's decoder of each block type, and
the row order of Llama's q and k from the definition: llama.cpp rotates rows 2i and 2i + 1 of a head together, Hugging Face i
and i + d/2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError
from r1q.core.gguf_file import GgufFile, GgufTensor
from r1q.core.grids import unpack
from r1q.core.qtensor import Floats
from r1q.core.scheme import GRIDS
from r1q.core.tensors import TensorSpec
from r1q.export.verified import Defect, Verified
from r1q.export.verify_rope import frequency, plain_frequency

if TYPE_CHECKING:
    from r1q.models.config import ModelConfig

SLAB_WEIGHTS = 1 << 18  # small enough that a slab's arrays stay in the cache
FACTORS = "rope_freqs.weight"
_ROUNDING = (
    1e-6  # float32 stores the file's real numbers; half a step is 6e-8, and factors come from several operations
)


def verify_gguf(checkpoint: QuantizedCheckpoint, path: Path) -> Verified:
    """Return every way in which the GGUF file `path` is not what `checkpoint` holds."""
    from r1q.models.config import ModelConfig

    try:
        file = GgufFile.open(path)
        config = ModelConfig.read(checkpoint.sidecar, name=checkpoint.model_name)
    except InputError as error:
        return Verified(format="gguf", path=path, files=0, tensors=0, defects=(_unreadable(path, error),))
    names = gguf_names(config.architecture, config.num_layers, checkpoint)
    defects = [*_metadata_defects(file, config), *_name_defects(file, names, config)]
    compared = 0
    for spec in checkpoint.tensors:
        tensor = file.tensors.get(names[spec.name])
        if tensor is not None:
            compared += 1
            try:
                defects += _tensor_defects(checkpoint, file, spec, tensor, config)
            except InputError as error:
                defects.append(Defect(where=tensor.name, what=str(error), difference=math.inf, unreadable=True))
    if FACTORS in file.tensors and config.rope_scaling is not None:
        compared += 1
        defects += _factor_defects(file, config)
    return Verified(format="gguf", path=path, files=0, tensors=compared, defects=tuple(defects))


def gguf_names(architecture: str, layers: int, checkpoint: QuantizedCheckpoint) -> dict[str, str]:
    """Return llama.cpp's name of every tensor by Hugging Face's, from the table in gguf."""
    import gguf

    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, layers)
    found = {s.name: table.get_name(_without_expert(s.name), (".weight", ".bias")) for s in checkpoint.tensors}
    return {name: str(known) if known else name for name, known in found.items()}


def _without_expert(name: str) -> str:
    """Return a name as gguf's table has it: experts under one name, the router's correction as a bias."""
    stacked = re.sub(r"\.mlp\.experts\.\d+\.", ".mlp.experts.", name)
    return stacked.replace(".gate.e_score_correction_bias", ".gate.e_score_correction.bias")


def _metadata_defects(file: GgufFile, config: ModelConfig) -> Iterator[Defect]:
    """Yield the hyper-parameters that the file states otherwise than the model's config.json."""
    if file.architecture != config.architecture:
        yield Defect(where="general.architecture", what=f"is {file.architecture!r}, the model is {config.architecture}")
        return
    wanted: Mapping[str, float] = {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": 1 if config.latent else config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    # llama.cpp's own default where a file does not say the length of a head.
    default = config.hidden_size // config.num_heads
    optional = {} if config.latent else {"attention.key_length": default, "attention.value_length": default}
    for key, value in {
        **wanted,
        **dict.fromkeys(optional, config.head_dim),
        **_moe_numbers(config.raw, config),
        **_yarn_numbers(config.raw, config),
    }.items():
        stated = file.metadata.get(f"{config.architecture}.{key}", optional.get(key))
        if not isinstance(stated, int | float) or not math.isclose(stated, value, rel_tol=_ROUNDING):
            said = "is missing" if stated is None else f"is {stated}"
            yield Defect(where=f"{config.architecture}.{key}", what=f"{said}, the model's config.json says {value}")


def _moe_numbers(raw: Mapping[str, Any], config: ModelConfig) -> Mapping[str, float]:
    """Return what a file must say of experts and latent attention, from config.json itself where it states it."""
    if config.experts is None:
        return {}
    stated = {
        "expert_used_count": raw.get("num_experts_per_tok"),
        "expert_feed_forward_length": raw.get("moe_intermediate_size"),
        "expert_count": raw.get("n_routed_experts", raw.get("num_experts", raw.get("num_local_experts"))),
    }
    if config.latent is not None:
        rank, turned = raw.get("kv_lora_rank", 512), raw.get("qk_rope_head_dim", 64)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        all_dim = rope.get("mscale_all_dim")
        stated |= {
            "attention.kv_lora_rank": rank,
            "attention.key_length": rank + turned,
            "attention.value_length": rank,
            "attention.key_length_mla": raw.get("qk_nope_head_dim", 128) + turned,
            "attention.value_length_mla": raw.get("v_head_dim", 128),
            "rope.dimension_count": turned,
            "expert_shared_count": raw.get("n_shared_experts"),
            "expert_weights_scale": raw.get("routed_scaling_factor"),
            "expert_gating_func": 2 if config.family == "deepseek_v3" else 1,
            "rope.scaling.yarn_log_multiplier": all_dim and 0.1 * all_dim,
            "expert_group_count": raw.get("n_group") if config.family == "deepseek_v3" else None,
        }
    return {key: value for key, value in stated.items() if value is not None}


def _yarn_numbers(raw: Mapping[str, Any], config: ModelConfig) -> Mapping[str, float]:
    if config.yarn is None:
        return {}
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    # The config was read: both are there.
    length = rope["original_max_position_embeddings"]
    return {"rope.scaling.factor": rope["factor"], "rope.scaling.original_context_length": length}


def _name_defects(file: GgufFile, names: Mapping[str, str], config: ModelConfig) -> Iterator[Defect]:
    expected = {*names.values(), *([FACTORS] if config.rope_scaling is not None else [])}
    for name in sorted(expected - set(file.tensors)):
        yield Defect(where=name, what="is missing in the file", difference=math.inf)
    for name in sorted(set(file.tensors) - expected):
        yield Defect(where=name, what="is in the file, but the checkpoint has no such tensor", difference=math.inf)


@dataclass(slots=True)
class _Count:
    """What differs within one tensor, summed over its slabs."""

    codes: int = 0
    scales: int = 0
    values: int = 0
    largest: float = 0.0

    def measure(self, have: Floats, want: Floats) -> None:
        """Add the values that differ; a number that is none counts as infinitely far."""
        with np.errstate(invalid="ignore", over="ignore"):
            distance = np.abs(have.astype(np.float64) - want.astype(np.float64))
        differs = (distance != 0) | np.isnan(distance)
        self.values += int(differs.sum())
        self.largest = max(self.largest, float(np.nan_to_num(distance, nan=np.inf).max(initial=0.0)))

    def defect(self, name: str) -> Defect | None:
        counts = {"code": self.codes, "stored scale": self.scales, "value": self.values}
        return Defect.of_counts(name, counts, self.largest)


def _tensor_defects(
    checkpoint: QuantizedCheckpoint, file: GgufFile, spec: TensorSpec, tensor: GgufTensor, config: ModelConfig
) -> Iterator[Defect]:
    scheme = checkpoint.scheme(spec.name)
    expected = scheme.grid if spec.is_matrix else "f32"
    shape = _shape_in_file(spec, config)
    if tensor.shape != shape or tensor.type != expected:
        have, want = (f"{kind} {list(sides)}" for kind, sides in ((tensor.type, tensor.shape), (expected, shape)))
        yield Defect(where=tensor.name, what=f"is {have}, the checkpoint has {want}", difference=math.inf)
        return
    try:
        head = _head_rows(file, spec)
    except InputError as error:
        yield Defect(where=tensor.name, what=str(error), difference=math.inf)
        return
    count, first = _Count(), (spec.expert or 0) * spec.rows
    where = tensor.name if spec.expert is None else f"{tensor.name}, expert {spec.expert}"
    if spec.is_matrix and GRIDS[expected].family == "ggml":
        for start, stop in _slabs(spec, head):
            rows = file.read_rows(tensor.name, first + start, first + stop)
            _compare_blocks(count, checkpoint, spec, start, _unturned(rows, head))
    elif spec.is_matrix:
        for start, stop in _slabs(spec, head):
            decoded = _decode(_unturned(file.read_rows(tensor.name, first + start, first + stop), head), expected)
            _compare_floats(count, decoded, checkpoint.read_rows(spec.name, start, stop))
    else:
        values = _decode(file.read_bytes(tensor.name).reshape(1, -1), expected).reshape(-1)
        _compare_floats(count, _unturned(values, head), checkpoint.read_rows(spec.name, 0, 1).reshape(-1))
    if (defect := count.defect(where)) is not None:
        yield defect


def _shape_in_file(spec: TensorSpec, config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of the tensor that holds `spec`: experts stacked, the halves of kv_b by heads."""
    if spec.expert is not None and config.experts is not None:
        return (config.experts.count, *spec.shape)
    if spec.name.endswith((".k_b_proj.weight", ".v_b_proj.weight")):
        return (config.num_heads, spec.rows // config.num_heads, spec.columns)
    return spec.shape


def _compare_blocks(
    count: _Count, checkpoint: QuantizedCheckpoint, spec: TensorSpec, start: int, packed: NDArray[np.uint8]
) -> None:
    """Add what differs between the file's packed rows from `start` on and the checkpoint's.

    Codes and scales are compared as stored; values are gguf's decoding of the file's bytes against our meaning of our codes.
    """
    scheme = checkpoint.scheme(spec.name)
    stored = checkpoint.packed_rows(spec.name, start, start + len(packed))
    want = unpack(scheme, stored, spec.columns)
    if not np.array_equal(packed, stored):
        have = unpack(scheme, np.ascontiguousarray(packed), spec.columns)
        count.codes += int((have.codes != want.codes).sum())
        count.scales += sum(_different_bits(have.params[name], want.params[name]) for name in want.params)
    have_values, want_values = _decode(packed, scheme.grid), want.dequantize()
    if not np.array_equal(have_values, want_values):
        count.measure(have_values, want_values)


def _different_bits(have: NDArray[np.generic], want: NDArray[np.generic]) -> int:
    kind = np.dtype(f"u{have.dtype.itemsize}")
    return int((np.ascontiguousarray(have).view(kind) != np.ascontiguousarray(want).view(kind)).sum())


def _compare_floats(count: _Count, have: Floats, want: Floats) -> None:
    """Add the values whose float32 bits differ."""
    if _different_bits(have, want):
        count.measure(have, want)
        count.values = _different_bits(have, want)  # −0 for 0 differs too


def _decode(stored: NDArray[np.generic], grid: str) -> Floats:
    """Return the float32 values of stored rows as gguf decodes them."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(invalid="ignore", over="ignore"):
        values = dequantize(np.ascontiguousarray(stored), GGMLQuantizationType[grid.upper()])
    return np.asarray(values, dtype=np.float32)


def _slabs(spec: TensorSpec, head: int | None) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows, whole heads where rows change their order within one."""
    step = max(1, SLAB_WEIGHTS // spec.columns)
    if head is not None:
        step = max(1, step // head) * head
    for start in range(0, spec.rows, step):
        yield start, min(start + step, spec.rows)


def _head_rows(file: GgufFile, spec: TensorSpec) -> int | None:
    """Return the rows of a head where llama.cpp wants another row order than Hugging Face, else None.

    The number of heads is the file's own: a wrong one would turn the rows wrongly in llama.cpp too.
    """
    kind = {"q_proj": "head_count", "k_proj": "head_count_kv"}.get(spec.name.split(".")[-2])
    if file.architecture != "llama" or kind is None:
        return None
    heads, rows = file.metadata.get(f"llama.attention.{kind}"), spec.shape[0]
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise InputError(f"its {rows} rows are not {heads} heads (llama.attention.{kind})")
    return rows // heads


def _unturned(rows: NDArray[Any], head: int | None) -> NDArray[Any]:
    """Return rows [heads · head, …] of a file in Hugging Face's order: row p·head/2 + i is the file's row 2i + p."""
    if head is None:
        return rows
    within = np.concatenate([np.arange(0, head, 2), np.arange(1, head, 2)])
    order = (np.arange(0, len(rows), head)[:, None] + within).reshape(-1)
    return np.ascontiguousarray(rows[order])


def _factor_defects(file: GgufFile, config: ModelConfig) -> Iterator[Defect]:
    """Hold the stored frequency factors against transformers' rule for Llama 3.1, one frequency at a time."""
    tensor = file.tensors[FACTORS]
    if tensor.type != "f32" or tensor.shape != (config.head_dim // 2,):
        yield Defect(where=FACTORS, what=f"is {tensor.type} {list(tensor.shape)}", difference=math.inf)
        return
    count = _Count()
    have = _decode(file.read_bytes(FACTORS).reshape(1, -1), "f32").reshape(-1)
    for index, factor in enumerate(have.tolist()):
        want = plain_frequency(config, index) / frequency(config, index)
        if not math.isclose(factor, want, rel_tol=_ROUNDING):
            count.measure(np.array([factor], np.float32), np.array([want], np.float32))
    if (defect := count.defect(FACTORS)) is not None:
        yield defect


def _unreadable(path: Path, error: InputError) -> Defect:
    said = str(error).removeprefix(f"{path}: ").removesuffix("; download or export it again")
    return Defect(where=path.name, what=said, unreadable=True)
