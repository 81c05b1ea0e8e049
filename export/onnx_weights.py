"""Which tensors of a checkpoint the ONNX graphs use, and under which names they stand in the data file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from r1q.core.cache_scales import CacheScales
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import UsageError
from r1q.core.formats import expert_forms
from r1q.core.tensors import TensorSpec
from r1q.export.onnx_data import (
    Blocks,
    Columns,
    DataFile,
    Order,
    add_blocks,
    add_columns,
    add_experts,
    add_floats,
    add_order,
    common_form,
)
from r1q.export.rope import frequencies
from r1q.models.config import ModelConfig

Table = Blocks | str  # block-quantized, or the name of a float32 tensor [rows, columns]
Matrix = Table | Columns
_Blocks = Mapping[int | None, Mapping[str, TensorSpec]]  # a block's tensors by their names in it
_STACKS = {
    "attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
    "attn.q_proj_kv_a": ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"),
    "attn.q_a_proj_kv_a": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    "attn.q_b_proj": ("self_attn.q_b_proj",),
    "mlp.shared_experts.gate_up_proj": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "mlp.shared_experts.down_proj": ("mlp.shared_experts.down_proj",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One product: the matrix, its bias or None, and how many rows come from each of the layers stacked in it.

    `order` names the tensor that says which input each column of the matrix is for, None where that is the input itself.
    """

    matrix: Matrix
    bias: str | None
    rows: tuple[int, ...]
    order: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts of a block: `router` float32 [experts, hidden]; `inner` has rows of gate and up in turn, `down` the rest.

    `correction` float32 [experts] is added to scores for the choice, if there is one.
    """

    router: str
    correction: str | None
    inner: Blocks
    down: Blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What the graphs refer to. `linears` by stem such as `model.layers.0.attn.qkv_proj`; `vectors` by their tensor's name.

    `experts` by block, of those that have some. `latents`: of latent attention, by block, the matrices of each head that make keys and
    values of latents, float32 [heads, rank, key_dim] and [heads, value_dim, rank].

    `rotary`: cosines and sines, float32 [context, head_dim/2]. `cache`: for each layer the scales of keys and of values where they are
    kept in 8 bits, float32 [1, kv_heads, 1, head_dim]; else nothing.
    """

    linears: Mapping[str, Linear]
    vectors: Mapping[str, str]
    embedding: Table
    rotary: tuple[str, str]
    experts: Mapping[int, Experts] = field(default_factory=dict)
    latents: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    cache: tuple[tuple[str, str], ...] = ()


def place_weights(
    checkpoint: QuantizedCheckpoint, config: ModelConfig, data: DataFile, context: int, cache: CacheScales | None = None
) -> Weights:
    """Place every tensor of the model in `data`. q, k and v are stacked, and gate and up, where they share one form and order.

    The order of down's inputs costs nothing: gate and up give their rows in it, and what lies between works on each alone.
    """
    specs = {spec.name: spec for spec in checkpoint.tensors}
    table, head = _place_ends(checkpoint, config, data, specs)
    linears, activations = {"lm_head": head}, checkpoint.activations
    blocks: dict[int | None, dict[str, TensorSpec]] = defaultdict(dict)
    for spec in checkpoint.tensors:
        blocks[spec.layer][spec.key] = spec
    experts: dict[int, Experts] = {}
    for layer in range(config.num_layers):
        if (found := _place_experts(checkpoint, data, layer, blocks[layer])) is not None:
            experts[layer] = found
        down = checkpoint.permutation(f"model.layers.{layer}.mlp.down_proj.weight")
        for stem, members in _stacks(checkpoint, specs, layer):
            tensors = [specs[f"{member}.weight"] for member in members]
            inputs = activations.static(layer, tensors[0].kind) if activations else None
            if inputs is None:
                order = down if tensors[0].kind in ("ffn_gate", "ffn_up") else None
                linears[stem] = _place_linear(checkpoint, data, stem, tensors, specs, order)
            else:
                columns = add_columns(data, checkpoint, stem, tensors, inputs)
                linears[stem] = _linear(checkpoint, data, stem, tensors, specs, columns)
    vectors = {
        name: add_floats(data, checkpoint, name, [spec])
        for name, spec in specs.items()
        if len(spec.shape) == 1 and spec.part == "weight"
    }
    rotary = _place_rotary(data, config, context)
    steps = () if cache is None else _place_cache(data, cache)
    latents = _place_latents(checkpoint, config, data, blocks)
    return Weights(
        linears=linears, vectors=vectors, embedding=table, rotary=rotary, experts=experts, latents=latents, cache=steps
    )


def _place_latents(
    checkpoint: QuantizedCheckpoint, config: ModelConfig, data: DataFile, blocks: _Blocks
) -> dict[int, tuple[str, str]]:
    """Place the halves of kv_b, whatever their scheme, in float32: ONNX Runtime multiplies no integers head by head."""
    latent, heads = config.latent, config.num_heads
    if latent is None:
        return {}

    def place(layer: int, kind: str, sides: tuple[int, int]) -> str:
        name = f"model.layers.{layer}.attn.{kind.removeprefix('attn_')}"
        rows = add_floats(data, checkpoint, f"{name}.weight", [blocks[layer][f"{kind}.weight"]])
        return data.alias(f"{name}.heads", rows, (heads, *sides))

    sides = {"attn_k_b": (latent.rank, latent.key_dim), "attn_v_b": (latent.value_dim, latent.rank)}
    return {
        layer: (place(layer, "attn_k_b", sides["attn_k_b"]), place(layer, "attn_v_b", sides["attn_v_b"]))
        for layer in range(config.num_layers)
    }


def _place_experts(
    checkpoint: QuantizedCheckpoint, data: DataFile, layer: int, specs: Mapping[str, TensorSpec]
) -> Experts | None:
    """Place a block's experts; None where it has none. Raises `UsageError` for columns in another order than inputs."""
    router = specs.get("ffn_gate_inp.weight")
    if router is None:
        return None
    count = sum(spec.kind == "ffn_down_exps" for spec in specs.values())
    gates, ups, downs = (
        [specs[f"ffn_{part}_exps.{expert}.weight"] for expert in range(count)] for part in ("gate", "up", "down")
    )
    for spec in (*gates, *ups, *downs):
        if checkpoint.permutation(spec.name) is not None:
            raise UsageError(
                f"{spec.name}: columns in order of activation have no form among experts in ONNX; --to gptq"
            )
    # One scheme for all of them: the plan has refused others.
    inner, down = expert_forms(checkpoint.scheme(downs[0].name), (gates[0].columns, downs[0].columns))
    name = f"model.layers.{layer}.mlp"
    return Experts(
        router=add_floats(data, checkpoint, f"{name}.router.weight", [router]),
        correction=None
        if (correction := specs.get("exp_probs_b.bias")) is None
        else add_floats(data, checkpoint, f"{name}.router.correction", [correction]),
        inner=add_experts(data, checkpoint, f"{name}.experts.gate_up_proj", list(zip(gates, ups, strict=True)), inner),
        down=add_experts(data, checkpoint, f"{name}.experts.down_proj", [[spec] for spec in downs], down),
    )


def _stacks(
    checkpoint: QuantizedCheckpoint, specs: Mapping[str, TensorSpec], layer: int
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the stem of each product of a block and the layers in it; those of different forms, biases or orders stand alone."""
    block = f"model.layers.{layer}."
    for stem, members in _STACKS.items():
        names = tuple(block + member for member in members)
        if not all(f"{name}.weight" in specs for name in names):
            continue  # another architecture's
        alike = common_form(checkpoint, [specs[f"{name}.weight"] for name in names])
        biased = {f"{name}.bias" in specs for name in names}
        orders = {_bytes(checkpoint.permutation(f"{name}.weight")) for name in names}
        if alike and len(biased) == len(orders) == 1:
            yield block + stem, names
            continue
        for name in names:
            yield name.replace("self_attn.", "attn."), (name,)


def _place_linear(
    checkpoint: QuantizedCheckpoint,
    data: DataFile,
    stem: str,
    tensors: Sequence[TensorSpec],
    specs: Mapping[str, TensorSpec],
    order: Order | None = None,
) -> Linear:
    """Place a product, each layer's rows in `order` where there is one."""
    forms = common_form(checkpoint, tensors)
    form = forms[0] if forms else None
    matrix: Table = (
        add_floats(data, checkpoint, f"{stem}.weight", tensors, order)
        if form is None
        else add_blocks(data, checkpoint, stem, tensors, form, order)
    )
    return _linear(checkpoint, data, stem, tensors, specs, matrix, order)


def _linear(
    checkpoint: QuantizedCheckpoint,
    data: DataFile,
    stem: str,
    tensors: Sequence[TensorSpec],
    specs: Mapping[str, TensorSpec],
    matrix: Matrix,
    order: Order | None = None,
) -> Linear:
    names = [tensor.name.removesuffix("weight") + "bias" for tensor in tensors]
    biases = [specs[name] for name in names if name in specs]
    bias = add_floats(data, checkpoint, f"{stem}.bias", biases, order) if biases else None
    inputs = None if tensors[0].kind == "ffn_down" else checkpoint.permutation(tensors[0].name)
    return Linear(
        matrix=matrix,
        bias=bias,
        rows=tuple(tensor.rows for tensor in tensors),
        order=None if inputs is None else add_order(data, inputs),
    )


def _bytes(order: Order | None) -> bytes:
    return b"" if order is None else order.tobytes()


def _place_ends(
    checkpoint: QuantizedCheckpoint, config: ModelConfig, data: DataFile, specs: Mapping[str, TensorSpec]
) -> tuple[Table, Linear]:
    """Place embedding and head; a tied head is the embedding's bytes under the shape that its operator wants."""
    spec = specs["model.embed_tokens.weight"]
    head = _place_linear(checkpoint, data, "model.embed_tokens" if config.tied else "lm_head",
                         [spec if config.tied else specs["lm_head.weight"]], specs)  # fmt: skip
    if config.tied and isinstance(head.matrix, str):
        return head.matrix, head
    table = head.matrix
    if not config.tied:
        table = _place_linear(checkpoint, data, "model.embed_tokens", [spec], specs).matrix
    if not isinstance(table, Blocks):
        assert isinstance(table, str)  # integers as inputs are of layers inside the blocks
        return table, head
    # GatherBlockQuantized wants rows of bytes where MatMulNBits wants rows of blocks of bytes.
    rows = data.alias("model.embed_tokens.rows", table.weight, (spec.rows, spec.columns * table.form.bits // 8))
    return replace(table, weight=rows), head


def _place_rotary(data: DataFile, config: ModelConfig, context: int) -> tuple[str, str]:
    """Place cosines and sines of every position, computed in float64 and stored in float32."""
    turns, scale = frequencies(config), 1.0 if config.yarn is None else config.yarn.turn_scale
    step = 4096

    def pieces(function: np.ufunc) -> Iterator[NDArray[np.generic]]:
        for start in range(0, context, step):
            positions = np.arange(start, min(start + step, context), dtype=np.float64)
            yield (scale * function(positions[:, None] * turns[None, :])).astype(np.float32)

    shape = (context, config.head_dim // 2)
    return (
        data.add("model.rotary.cos", "float32", shape, lambda: pieces(np.cos)),
        data.add("model.rotary.sin", "float32", shape, lambda: pieces(np.sin)),
    )


def _place_cache(data: DataFile, cache: CacheScales) -> tuple[tuple[str, str], ...]:
    """Place what a step of each channel of keys and values is worth, in the shape that GroupQueryAttention wants."""

    def place(layer: int, part: str, scales: NDArray[np.float32]) -> str:
        return data.add(f"model.layers.{layer}.attn.{part}_scale", "float32", scales.shape, lambda: iter([scales]))

    return tuple(
        (place(layer, "k", keys[None, :, None]), place(layer, "v", values[None, :, None]))
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True))
    )
