"""Families of models: which tensors they have, what each is called, what it does, and its shape.

Tables say everything. `FAMILIES` has a row per architecture; the tables of roles have a row per tensor. A name in a checkpoint that
no row explains, and a row that no name fills, are errors: nothing is ignored but buffers that the forward pass computes itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

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
    """One architecture. `qkv_bias` None: the config's `attention_bias` decides, and then also for the output projection.

    `gguf` is the architecture's name in GGUF files, `experts` whose way of choosing experts it has, `latent` whether keys and values
    are compressed.
    """

    name: str
    architecture: str
    qkv_bias: bool | None
    qk_norm: bool
    mlp_bias: bool
    default_head_dim: int | None
    gguf: str
    experts: Literal["qwen", "deepseek-v2", "deepseek-v3"] | None = None
    latent: bool = False


def _deepseek(version: Literal[2, 3]) -> Family:
    return Family(
        name=f"deepseek_v{version}",
        architecture=f"DeepseekV{version}ForCausalLM",
        qkv_bias=False,
        qk_norm=False,
        mlp_bias=False,
        default_head_dim=None,
        gguf="deepseek2",
        experts="deepseek-v3" if version == 3 else "deepseek-v2",
        latent=True,
    )


def _families() -> Mapping[str, Family]:
    rows = [
        Family(
            name="llama",
            architecture="LlamaForCausalLM",
            qkv_bias=None,
            qk_norm=False,
            mlp_bias=True,
            default_head_dim=None,
            gguf="llama",
        ),
        Family(
            name="qwen2",
            architecture="Qwen2ForCausalLM",
            qkv_bias=True,
            qk_norm=False,
            mlp_bias=False,
            default_head_dim=None,
            gguf="qwen2",
        ),
        Family(
            name="qwen3",
            architecture="Qwen3ForCausalLM",
            qkv_bias=None,
            qk_norm=True,
            mlp_bias=False,
            default_head_dim=128,
            gguf="qwen3",
        ),
        Family(
            name="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            qkv_bias=None,
            qk_norm=True,
            mlp_bias=False,
            default_head_dim=None,
            gguf="qwen3moe",
            experts="qwen",
        ),
        _deepseek(2),
        _deepseek(3),
    ]
    return MappingProxyType({family.name: family for family in rows})


FAMILIES: Mapping[str, Family] = _families()


@dataclass(frozen=True, slots=True)
class _Role:
    """One tensor of a block or of the ends: GGUF's word for it, weight or bias, its name, its axes, and what switches it on.

    A name is the stem and the part, unless the stem says it whole.
    """

    kind: str
    part: str
    stem: str
    axes: tuple[str, ...]
    switch: str = "always"
    whole: bool = False

    @property
    def name(self) -> str:
        """The name within the block."""
        return self.stem if self.whole else f"{self.stem}.{self.part}"


def _feed_forward(stem: str, suffix: str, inner: str, switch: str) -> tuple[_Role, ...]:
    return (
        _Role(f"ffn_gate{suffix}", "weight", f"{stem}.gate_proj", (inner, "hidden"), switch),
        _Role(f"ffn_up{suffix}", "weight", f"{stem}.up_proj", (inner, "hidden"), switch),
        _Role(f"ffn_down{suffix}", "weight", f"{stem}.down_proj", ("hidden", inner), switch),
    )


_HEADS = (
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
)
# k_b_proj and v_b_proj are the two halves of kv_b_proj (`models/layout.py`), k_b_proj with every head transposed.
_LATENT = (
    _Role("attn_q", "weight", "self_attn.q_proj", ("queries", "hidden"), "plain_queries"),
    _Role("attn_q_a", "weight", "self_attn.q_a_proj", ("query_rank", "hidden"), "latent_queries"),
    _Role("attn_q_a_norm", "weight", "self_attn.q_a_layernorm", ("query_rank",), "latent_queries"),
    _Role("attn_q_b", "weight", "self_attn.q_b_proj", ("queries", "query_rank"), "latent_queries"),
    _Role("attn_kv_a_mqa", "weight", "self_attn.kv_a_proj_with_mqa", ("rank_and_turned", "hidden")),
    _Role("attn_kv_a_norm", "weight", "self_attn.kv_a_layernorm", ("rank",)),
    _Role("attn_k_b", "weight", "self_attn.k_b_proj", ("heads_ranks", "key")),
    _Role("attn_v_b", "weight", "self_attn.v_b_proj", ("values", "rank")),
    _Role("attn_output", "weight", "self_attn.o_proj", ("hidden", "values")),
)
_DENSE = (
    _Role("ffn_gate", "weight", "mlp.gate_proj", ("inner", "hidden")),
    _Role("ffn_gate", "bias", "mlp.gate_proj", ("inner",), "mlp_bias"),
    _Role("ffn_up", "weight", "mlp.up_proj", ("inner", "hidden")),
    _Role("ffn_up", "bias", "mlp.up_proj", ("inner",), "mlp_bias"),
    _Role("ffn_down", "weight", "mlp.down_proj", ("hidden", "inner")),
    _Role("ffn_down", "bias", "mlp.down_proj", ("hidden",), "mlp_bias"),
)
_SPARSE = (
    _Role("ffn_gate_inp", "weight", "mlp.gate", ("experts", "hidden")),
    _Role("exp_probs_b", "bias", "mlp.gate.e_score_correction_bias", ("experts",), "corrected", whole=True),
    *_feed_forward("mlp.shared_experts", "_shexp", "shared_inner", "shared"),
)
_EXPERT = _feed_forward("mlp.experts.{}", "_exps", "expert_inner", "always")
_NORMS = (
    _Role("attn_norm", "weight", "input_layernorm", ("hidden",)),
    _Role("ffn_norm", "weight", "post_attention_layernorm", ("hidden",)),
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
    wanted = {slot.name: slot for slot in _slots(config)}
    _refuse_names(where, "lacks", [name for name in wanted if name not in headers])
    known = {*wanted, HEAD} if config.tied else set(wanted)
    _refuse_names(
        where, "has unexpected", [name for name in headers if name not in known and not _COMPUTED.search(name)]
    )
    axes, dtypes = _axes(config), (*FLOAT_DTYPES, *(("F8_E4M3",) if config.fp8_block else ()))
    return tuple(_spec(where, slot, axes, headers[name], dtypes) for name, slot in wanted.items())


@dataclass(frozen=True, slots=True)
class _Slot:
    """One tensor that a model has: its name, block, role and expert."""

    name: str
    layer: int | None
    role: _Role
    expert: int | None = None


def _slots(config: ModelConfig) -> Iterator[_Slot]:
    experts, latent = config.experts, config.latent
    on = {
        "always": True,
        "qkv_bias": config.qkv_bias,
        "output_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "qk_norm": config.qk_norm,
        "untied": not config.tied,
        "plain_queries": latent is not None and latent.query_rank is None,
        "latent_queries": latent is not None and latent.query_rank is not None,
        "corrected": experts is not None and experts.corrected,
        "shared": experts is not None and experts.shared_inner > 0,
    }
    yield _Slot(_FIRST.name, None, _FIRST)
    for layer in range(config.num_layers):
        attention, stem = _LATENT if latent else _HEADS, f"model.layers.{layer}."
        for role in (_NORMS[0], *attention, _NORMS[1], *(_SPARSE if config.is_sparse(layer) else _DENSE)):
            if on[role.switch]:
                yield _Slot(stem + role.name, layer, role)
        if experts is not None and config.is_sparse(layer):
            for role in _EXPERT:
                for expert in range(experts.count):
                    yield _Slot(stem + role.name.format(expert), layer, role, expert)
    for role in _LAST:
        if on[role.switch]:
            yield _Slot(role.name, None, role)


def _axes(config: ModelConfig) -> Mapping[str, int]:
    heads, latent, experts = config.num_heads, config.latent, config.experts
    axes = {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "head": config.head_dim,
        "queries": heads * config.head_dim,
        "keys": config.num_kv_heads * config.head_dim,
    }
    if latent is not None:
        axes |= {
            "queries": heads * (latent.key_dim + latent.rope_dim),
            "query_rank": latent.query_rank or 0,
            "rank": latent.rank,
            "rank_and_turned": latent.rank + latent.rope_dim,
            "heads_ranks": heads * latent.rank,
            "key": latent.key_dim,
            "values": heads * latent.value_dim,
        }
    if experts is not None:
        axes |= {"experts": experts.count, "expert_inner": experts.inner, "shared_inner": experts.shared_inner}
    return axes


def _spec(where: str, slot: _Slot, axes: Mapping[str, int], header: Header, dtypes: Sequence[str]) -> TensorSpec:
    role, name = slot.role, slot.name
    shape = tuple(axes[axis] for axis in role.axes)
    if header.shape != shape:
        raise InputError(
            f"{where}: {name} has the shape {list(header.shape)}, config.json says {list(shape)} ({' × '.join(role.axes)}); "
            "the two do not belong together"
        )
    if header.dtype not in dtypes:
        raise InputError(
            f"{where}: {name} is stored as {header.dtype}; r1q reads {', '.join(dtypes)}: take the unquantized checkpoint"
        )
    return TensorSpec(
        name=name,
        kind=role.kind,
        layer=slot.layer,
        part=role.part,
        shape=shape,
        dtype=header.dtype,
        expert=slot.expert,
    )


def _refuse_names(where: str, verb: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:_NAMES_IN_A_MESSAGE])
        more = f" and {len(names) - _NAMES_IN_A_MESSAGE} more" if len(names) > _NAMES_IN_A_MESSAGE else ""
        raise InputError(f"{where} {verb} tensors: {shown}{more}; config.json and the weights do not belong together")
