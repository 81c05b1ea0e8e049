"""Families of models: which tensors they have, what each is called, what it does, and its shape.

Two tables say everything. `FAMILIES` has a row per architecture; `_BLOCK` and `_ENDS` have a row per tensor. A name in a
checkpoint that no row explains, and a row that no name fills, are errors: nothing is ignored but buffers that the forward
pass computes itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from r1q.core.errors import InputError
from r1q.core.tensors import TensorSpec

if TYPE_CHECKING:
    from r1q.models.config import ModelConfig

FLOAT_DTYPES = ("BF16", "F16", "F32")
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")  # old checkpoints store it; it follows from the config
_NAMES_IN_A_MESSAGE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture. `qkv_bias` None: the config's `attention_bias` decides, and then also for the output projection."""

    name: str
    architecture: str
    qkv_bias: bool | None
    qk_norm: bool
    mlp_bias: bool
    default_head_dim: int | None


def _families() -> Mapping[str, Family]:
    rows = [
        Family(
            name="llama",
            architecture="LlamaForCausalLM",
            qkv_bias=None,
            qk_norm=False,
            mlp_bias=True,
            default_head_dim=None,
        ),
        Family(
            name="qwen2",
            architecture="Qwen2ForCausalLM",
            qkv_bias=True,
            qk_norm=False,
            mlp_bias=False,
            default_head_dim=None,
        ),
        Family(
            name="qwen3",
            architecture="Qwen3ForCausalLM",
            qkv_bias=None,
            qk_norm=True,
            mlp_bias=False,
            default_head_dim=128,
        ),
    ]
    return MappingProxyType({family.name: family for family in rows})


FAMILIES: Mapping[str, Family] = _families()


@dataclass(frozen=True, slots=True)
class _Role:
    """One tensor of a block or of the ends: GGUF's word for it, weight or bias, its name, its axes, and what switches it on."""

    kind: str
    part: str
    stem: str
    axes: tuple[str, ...]
    switch: str = "always"


_BLOCK = (
    _Role("attn_norm", "weight", "input_layernorm", ("hidden",)),
    _Role("attn_q", "weight", "self_attn.q_proj", ("queries", "hidden")),
    _Role("attn_q", "bias", "self_attn.q_proj", ("queries",), "qkv_bias"),
    _Role("attn_k", "weight", "self_attn.k_proj", ("keys", "hidden")),
    _Role("attn_k", "bias", "self_attn.k_proj", ("keys",), "qkv_bias"),
    _Role("attn_v", "weight", "self_attn.v_proj", ("keys", "hidden")),
    _Role("attn_v", "bias", "self_attn.v_proj", ("keys",), "qkv_bias"),
    _Role("attn_q_norm", "weight", "self_attn.q_norm", ("head",), "qk_norm"),
    _Role("attn_k_norm", "weight", "self_attn.k_norm", ("head",), "qk_norm"),
    _Role("attn_output", "weight", "self_attn.o_proj", ("hidden", "queries")),
    _Role("attn_output", "bias", "self_attn.o_proj", ("hidden",), "output_bias"),
    _Role("ffn_norm", "weight", "post_attention_layernorm", ("hidden",)),
    _Role("ffn_gate", "weight", "mlp.gate_proj", ("inner", "hidden")),
    _Role("ffn_gate", "bias", "mlp.gate_proj", ("inner",), "mlp_bias"),
    _Role("ffn_up", "weight", "mlp.up_proj", ("inner", "hidden")),
    _Role("ffn_up", "bias", "mlp.up_proj", ("inner",), "mlp_bias"),
    _Role("ffn_down", "weight", "mlp.down_proj", ("hidden", "inner")),
    _Role("ffn_down", "bias", "mlp.down_proj", ("hidden",), "mlp_bias"),
)
_FIRST = _Role("token_embd", "weight", "model.embed_tokens", ("vocabulary", "hidden"))
_LAST = (
    _Role("output_norm", "weight", "model.norm", ("hidden",)),
    _Role("output", "weight", "lm_head", ("vocabulary", "hidden"), "untied"),
)


class Header(Protocol):
    """What a file's header says of a tensor (`core.safetensors_file.Entry` is one)."""

    @property
    def dtype(self) -> str:
        """The stored dtype, spelled as safetensors spells it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""


def tensor_specs(
    config: ModelConfig, headers: Mapping[str, Header], where: str = "the checkpoint"
) -> tuple[TensorSpec, ...]:
    """Return every tensor of the model in order: token_embd, the blocks, output_norm, output (unless tied).

    `headers` maps the checkpoint's names to dtype and shape; `where` names the checkpoint in errors. Raises `InputError` when a
    tensor is missing, unexpected, of another shape than the config says, or not float. `lm_head.weight` in a tied model is
    left out here; `ModelSource` checks that it repeats the embedding.
    """
    wanted = {name: (layer, role) for name, layer, role in _roles(config)}
    _refuse_names(where, "lacks", [name for name in wanted if name not in headers])
    known = {*wanted, HEAD} if config.tied else set(wanted)
    _refuse_names(
        where, "has unexpected", [name for name in headers if name not in known and not _COMPUTED.search(name)]
    )
    axes = _axes(config)
    return tuple(_spec(where, name, layer, role, axes, headers[name]) for name, (layer, role) in wanted.items())


def _roles(config: ModelConfig) -> Iterator[tuple[str, int | None, _Role]]:
    on = {
        "always": True,
        "qkv_bias": config.qkv_bias,
        "output_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "qk_norm": config.qk_norm,
        "untied": not config.tied,
    }
    yield f"{_FIRST.stem}.{_FIRST.part}", None, _FIRST
    for layer in range(config.num_layers):
        for role in _BLOCK:
            if on[role.switch]:
                yield f"model.layers.{layer}.{role.stem}.{role.part}", layer, role
    for role in _LAST:
        if on[role.switch]:
            yield f"{role.stem}.{role.part}", None, role


def _axes(config: ModelConfig) -> Mapping[str, int]:
    return {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "head": config.head_dim,
        "queries": config.num_heads * config.head_dim,
        "keys": config.num_kv_heads * config.head_dim,
    }


def _spec(where: str, name: str, layer: int | None, role: _Role, axes: Mapping[str, int], header: Header) -> TensorSpec:
    shape = tuple(axes[axis] for axis in role.axes)
    if header.shape != shape:
        raise InputError(
            f"{where}: {name} has the shape {list(header.shape)}, config.json says {list(shape)} ({' × '.join(role.axes)}); "
            "the two do not belong together"
        )
    if header.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"{where}: {name} is stored as {header.dtype}; r1q reads {', '.join(FLOAT_DTYPES)}: take the unquantized checkpoint"
        )
    return TensorSpec(name=name, kind=role.kind, layer=layer, part=role.part, shape=shape, dtype=header.dtype)


def _refuse_names(where: str, verb: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:_NAMES_IN_A_MESSAGE])
        more = f" and {len(names) - _NAMES_IN_A_MESSAGE} more" if len(names) > _NAMES_IN_A_MESSAGE else ""
        raise InputError(f"{where} {verb} tensors: {shown}{more}; config.json and the weights do not belong together")
