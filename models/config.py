"""ModelConfig: what `config.json` says, read once, checked, and refused where the forward pass would differ.

transformers ≥ 5 writes `rope_parameters` and `dtype`; older versions `rope_theta`, `rope_scaling` and `torch_dtype`. Both are read.
Defaults for absent keys are those of transformers' LlamaConfig, Qwen2Config and Qwen3Config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from r1q.core.errors import InputError
from r1q.core.hf_folder import MAX_JSON_BYTES as MAX_JSON_BYTES
from r1q.core.hf_folder import read_json as read_json
from r1q.models.config_keys import Keys
from r1q.models.config_moe import (
    Experts,
    Latent,
    Yarn,
    read_deepseek_experts,
    read_latent,
    read_qwen_experts,
    read_yarn,
)
from r1q.models.families import FAMILIES, Family

_MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's stretched rotary frequencies: slow ones divided by `factor`, fast ones kept, a blend between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The facts of a model that its tensors do not carry. `raw` is config.json as it stands.

    With latent attention `head_dim` is the part of a head that turns. `experts` None: every block is dense. `fp8_block` are the rows
    and columns that share a scale where weights are stored as 8-bit floats. `mtp_layers` predict further tokens and are left out.
    """

    family: str
    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    max_position_embeddings: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]
    raw: Mapping[str, Any]
    yarn: Yarn | None = None
    experts: Experts | None = None
    latent: Latent | None = None
    fp8_block: tuple[int, int] | None = None
    mtp_layers: int = 0

    @property
    def architecture(self) -> str:
        """GGUF's name of the architecture."""
        return FAMILIES[self.family].gguf

    @property
    def cached_heads(self) -> tuple[int, int]:
        """How many heads of how many numbers each position keeps as keys; of latent attention one, the latent with its ending."""
        if self.latent is None:
            return self.num_kv_heads, self.head_dim
        return 1, self.latent.rank + self.latent.rope_dim

    def is_sparse(self, layer: int) -> bool:
        """Return whether block `layer` has experts."""
        return self.experts is not None and layer not in self.experts.dense

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> ModelConfig:
        """Read a model folder (its config.json, and end-of-text ids of its generation_config.json) or one config.json.

        `name` is the model's name for people; without it, the folder's (or the hub id's, in a download cache) is taken.
        Raises `InputError` for a missing, malformed or unsupported config, with the key and the reason.
        """
        file = path / "config.json" if path.is_dir() else path
        raw = read_json(file)
        generation = file.with_name("generation_config.json")
        extra = read_json(generation) if generation.is_file() else {}
        return config_of(raw, where=str(file), name=name or _folder_name(file.parent), generation=extra)


def config_of(
    raw: Mapping[str, Any], *, where: str, name: str, generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Return the config that the parsed JSON `raw` means; `where` names its file in errors."""
    family = _family(raw, where)
    keys = Keys(raw, where)
    _refuse_unsupported(keys, family)
    heads = keys.size("num_attention_heads")
    hidden = keys.size("hidden_size")
    kv_heads = keys.size("num_key_value_heads", heads if family.name == "llama" or family.latent else None)
    latent = read_latent(keys) if family.latent else None
    head_dim = keys.size("head_dim", family.default_head_dim or hidden // heads or None)
    if latent is not None:
        kv_heads, head_dim = heads, latent.rope_dim
    if heads % kv_heads:
        raise keys.bad("num_key_value_heads", f"does not divide the {heads} attention heads")
    if head_dim % 2:
        raise keys.bad("head_dim", "is odd, and rotary embeddings turn pairs")
    attention_bias = keys.flag("attention_bias") if family.qkv_bias is None else False
    layers = keys.size("num_hidden_layers")
    if layers > _MAX_LAYERS:
        raise keys.bad("num_hidden_layers", f"is more than {_MAX_LAYERS}")
    theta, scaling, yarn = _rope(keys, family)
    return ModelConfig(
        family=family.name,
        name=name,
        vocab_size=keys.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=keys.size("max_position_embeddings"),
        tied=keys.flag("tie_word_embeddings"),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias,
        mlp_bias=family.mlp_bias and keys.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        bos_id=next(iter(keys.ids("bos_token_id")), None),
        eos_ids=tuple(dict.fromkeys(keys.ids("eos_token_id") + Keys(generation or {}, where).ids("eos_token_id"))),
        raw=MappingProxyType(dict(raw)),
        yarn=yarn,
        experts=_experts(keys, family),
        latent=latent,
        fp8_block=_fp8_block(keys),
        mtp_layers=_mtp_layers(keys) if family.latent else 0,
    )


def _experts(keys: Keys, family: Family) -> Experts | None:
    if family.experts is None:
        return None
    version = {"deepseek-v2": 2, "deepseek-v3": 3}.get(family.experts)
    return read_qwen_experts(keys) if version is None else read_deepseek_experts(keys, version)


def _mtp_layers(keys: Keys) -> int:
    stated = next((key for key in ("num_nextn_predict_layers", "num_mtp_layers") if keys.get(key) is not None), None)
    return 1 if stated is None else keys.count(stated)


def _fp8_block(keys: Keys) -> tuple[int, int] | None:
    """Return the block of DeepSeek's 8-bit floats, None for a checkpoint that is not quantized; refuse every other quantization."""
    found = keys.get("quantization_config")
    if found is None:
        return None
    said = found if isinstance(found, dict) else {}
    block = said.get("weight_block_size")
    known = said.get("quant_method") == "fp8" and said.get("fmt") in (None, "e4m3")
    if known and isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block):
        return block[0], block[1]
    raise InputError(
        f"{keys.where}: quantization_config = {_shortened(found)} is already quantized: take the original weights"
    )


def _family(raw: Mapping[str, Any], where: str) -> Family:
    architectures = raw.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    by_architecture = {family.architecture: family for family in FAMILIES.values()}
    model_type = raw.get("model_type")
    supported = ", ".join(by_architecture)
    if not isinstance(architecture, str | None) or not isinstance(model_type, str | None):
        raise InputError(f"{where}: architectures and model_type are not text; r1q supports {supported}")
    if architecture is None:
        found = FAMILIES.get(model_type or "")
    else:
        found = by_architecture.get(architecture)
        if found and model_type not in (None, found.name):
            raise InputError(f"{where}: architecture {architecture} does not go with model_type {model_type!r}")
    if found is None:
        raise InputError(
            f"{where}: the architecture {architecture or model_type!r} is not supported; r1q supports {supported}"
        )
    return found


_Use = Callable[[Keys], bool]
# What a config may ask for that the decoder blocks here do not do: (key, is it in use, why it is refused).
_UNSUPPORTED: tuple[tuple[str, _Use, str], ...] = (
    ("hidden_act", lambda k: k.get("hidden_act") not in (None, "silu"), "is not supported: r1q knows silu"),
    ("layer_types", lambda k: _slides_by_type(k), "asks for sliding-window attention, which is not supported"),
    ("use_sliding_window", lambda k: _slides_by_depth(k), "asks for sliding-window attention, which is not supported"),
    (
        "partial_rotary_factor",
        lambda k: k.get("partial_rotary_factor") not in (None, 1, 1.0),
        "is not supported: r1q turns whole heads",
    ),
)


def _slides_by_type(keys: Keys) -> bool:
    types = keys.get("layer_types")
    return types is not None and (not isinstance(types, list) or any(kind != "full_attention" for kind in types))


def _slides_by_depth(keys: Keys) -> bool:
    """Whether a layer is deep enough for the window: transformers slides layers from max_window_layers on."""
    if not keys.flag("use_sliding_window") or keys.get("sliding_window") is None or keys.get("layer_types") is not None:
        return False
    return keys.size("num_hidden_layers") > keys.size("max_window_layers", 28)


def _refuse_unsupported(keys: Keys, family: Family) -> None:
    for key in ("num_experts", "num_local_experts", "n_routed_experts") if family.experts is None else ():
        if keys.get(key):
            why = "means a mixture of experts, which this architecture does not have"
            raise InputError(f"{keys.where}: {key} = {_shortened(keys.get(key))} {why}")
    for key, in_use, why in _UNSUPPORTED:
        if in_use(keys):
            raise InputError(f"{keys.where}: {key} = {_shortened(keys.get(key))} {why}")


def _shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"


_DEFAULT_THETA = 10000.0


def _rope(keys: Keys, family: Family) -> tuple[float, Llama3Scaling | None, Yarn | None]:
    """Return the base of the rotary frequencies and their scaling, from either spelling."""
    new, old = keys.get("rope_parameters"), keys.get("rope_scaling")
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise keys.bad(key, "is not an object")
    rope = Keys(new or old or {}, f"{keys.where}: {'rope_parameters' if new else 'rope_scaling'}")
    theta = rope.number("rope_theta", keys.number("rope_theta", _DEFAULT_THETA))
    if keys.get("rope_theta") is not None and theta != keys.number("rope_theta"):
        raise keys.bad("rope_theta", f"contradicts rope_parameters, which says {theta:g}")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise rope.bad("partial_rotary_factor", "is not supported: r1q turns whole heads")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None, None
    if kind == "yarn":
        return theta, None, read_yarn(rope)
    if kind != "llama3" or family.latent:
        raise InputError(f"{rope.where}: the rope type {kind!r} is not supported; r1q knows default, llama3 and yarn")
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.size("original_max_position_embeddings"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise rope.bad("low_freq_factor", f"is not below high_freq_factor {scaling.high_freq_factor:g}")
    return theta, scaling, None


def _folder_name(folder: Path) -> str:
    """Return a model's name for people: its folder's, or `name` of a cache's `models--org--name/snapshots/<commit>`."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.split("--")[-1]
    return folder.name
