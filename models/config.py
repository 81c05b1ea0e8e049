"""ModelConfig: what `config.json` says, read once, checked, and refused where the forward pass would differ.

transformers ≥ 5 writes `rope_parameters` and `dtype`; older versions `rope_theta`, `rope_scaling` and `torch_dtype`. Both are read.
Defaults for absent keys are those of transformers' LlamaConfig, Qwen2Config and Qwen3Config.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from r1q.core.errors import InputError
from r1q.models.families import FAMILIES, Family

MAX_JSON_BYTES = 8 << 20
_MAX_SIZE = 1 << 31
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
    """The facts of a model that its tensors do not carry. `raw` is config.json as it stands."""

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
    keys = _Keys(raw, where)
    _refuse_unsupported(keys)
    heads = keys.size("num_attention_heads")
    hidden = keys.size("hidden_size")
    kv_heads = keys.size("num_key_value_heads", heads if family.name == "llama" else None)
    head_dim = keys.size("head_dim", family.default_head_dim or hidden // heads or None)
    if heads % kv_heads:
        raise keys.bad("num_key_value_heads", f"does not divide the {heads} attention heads")
    if head_dim % 2:
        raise keys.bad("head_dim", "is odd, and rotary embeddings turn pairs")
    attention_bias = keys.flag("attention_bias") if family.qkv_bias is None else False
    layers = keys.size("num_hidden_layers")
    if layers > _MAX_LAYERS:
        raise keys.bad("num_hidden_layers", f"is more than {_MAX_LAYERS}")
    theta, scaling = _rope(keys)
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
        eos_ids=tuple(dict.fromkeys(keys.ids("eos_token_id") + _Keys(generation or {}, where).ids("eos_token_id"))),
        raw=MappingProxyType(dict(raw)),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path` (at most 8 MiB). Raises `InputError` when it is missing, too large or not an object."""
    try:
        if path.exists() and not path.is_file():
            # A pipe would wait for ever, and a device never end.
            raise InputError(f"{path} is not a regular file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path} has more than {MAX_JSON_BYTES} bytes; that is no settings file")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing; give a folder with a Hugging Face checkpoint (config.json, *.safetensors)"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object; fetch it again")
    return value


class _Keys:
    """A JSON object whose values are taken by key and type; every complaint names the file and the key."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def bad(self, key: str, why: str) -> InputError:
        """Return the error for a value that cannot be used."""
        return InputError(f"{self.where}: {key} = {self.raw.get(key)!r} {why}")

    def get(self, key: str) -> Any:
        """Return the value, None when it is absent or null."""
        return self.raw.get(key)

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive integer of believable size."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value < _MAX_SIZE:
            raise self.bad(key, "is not a positive integer" if key in self.raw else "is missing")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, int | float) and type(value) is not bool and 0 < value <= sys.float_info.max:
            return float(value)
        raise self.bad(key, "is not a positive number" if key in self.raw else "is missing")

    def flag(self, key: str) -> bool:
        """Return a boolean, False when it is absent."""
        value = self.raw.get(key)
        if value is not None and type(value) is not bool:
            raise self.bad(key, "is not true or false")
        return bool(value)

    def ids(self, key: str) -> tuple[int, ...]:
        """Return token ids: a number, a list of them, or none."""
        value = self.raw.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(item) is int and item >= 0 for item in values):
            raise self.bad(key, "is not a token id or a list of them")
        return tuple(values)


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


_Use = Callable[[_Keys], bool]
# What a config may ask for that the decoder blocks here do not do: (key, is it in use, why it is refused).
_UNSUPPORTED: tuple[tuple[str, _Use, str], ...] = (
    (
        "quantization_config",
        lambda k: k.get("quantization_config") is not None,
        "is already quantized: take the original weights",
    ),
    ("hidden_act", lambda k: k.get("hidden_act") not in (None, "silu"), "is not supported: r1q knows silu"),
    ("num_experts", lambda k: bool(k.get("num_experts")), "means a mixture of experts, which is not supported"),
    (
        "num_local_experts",
        lambda k: bool(k.get("num_local_experts")),
        "means a mixture of experts, which is not supported",
    ),
    ("layer_types", lambda k: _slides_by_type(k), "asks for sliding-window attention, which is not supported"),
    ("use_sliding_window", lambda k: _slides_by_depth(k), "asks for sliding-window attention, which is not supported"),
    (
        "partial_rotary_factor",
        lambda k: k.get("partial_rotary_factor") not in (None, 1, 1.0),
        "is not supported: r1q turns whole heads",
    ),
)


def _slides_by_type(keys: _Keys) -> bool:
    types = keys.get("layer_types")
    return types is not None and (not isinstance(types, list) or any(kind != "full_attention" for kind in types))


def _slides_by_depth(keys: _Keys) -> bool:
    """Whether a layer is deep enough for the window: transformers slides layers from max_window_layers on."""
    if not keys.flag("use_sliding_window") or keys.get("sliding_window") is None or keys.get("layer_types") is not None:
        return False
    return keys.size("num_hidden_layers") > keys.size("max_window_layers", 28)


def _refuse_unsupported(keys: _Keys) -> None:
    for key, in_use, why in _UNSUPPORTED:
        if in_use(keys):
            raise InputError(f"{keys.where}: {key} = {_shortened(keys.get(key))} {why}")


def _shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"


_DEFAULT_THETA = 10000.0


def _rope(keys: _Keys) -> tuple[float, Llama3Scaling | None]:
    """Return the base of the rotary frequencies and their scaling, from either spelling."""
    new, old = keys.get("rope_parameters"), keys.get("rope_scaling")
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise keys.bad(key, "is not an object")
    rope = _Keys(new or old or {}, f"{keys.where}: {'rope_parameters' if new else 'rope_scaling'}")
    theta = rope.number("rope_theta", keys.number("rope_theta", _DEFAULT_THETA))
    if keys.get("rope_theta") is not None and theta != keys.number("rope_theta"):
        raise keys.bad("rope_theta", f"contradicts rope_parameters, which says {theta:g}")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise rope.bad("partial_rotary_factor", "is not supported: r1q turns whole heads")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f"{rope.where}: the rope type {kind!r} is not supported; r1q knows default and llama3")
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.size("original_max_position_embeddings"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise rope.bad("low_freq_factor", f"is not below high_freq_factor {scaling.high_freq_factor:g}")
    return theta, scaling


def _folder_name(folder: Path) -> str:
    """Return a model's name for people: its folder's, or `name` of a cache's `models--org--name/snapshots/<commit>`."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.split("--")[-1]
    return folder.name
