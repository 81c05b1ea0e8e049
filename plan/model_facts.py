"""What a model folder's settings files say of a model, supported by r1q or not; none of them is believed to be well-formed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1q.core.errors import InputError
from r1q.models.config import read_json
from r1q.models.source import contained
from r1q.plan.inspection import ModelFacts, Shown, shortened

MAX_TEMPLATE_BYTES = 4 << 20
_HEAD = "lm_head.weight"
_MAX_TEXT = 200
_MAX_DEPTH = 3
# What to call a size, and config.json's word for it.
_SIZES: Mapping[str, str] = {
    "blocks": "num_hidden_layers",
    "width": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv heads": "num_key_value_heads",
    "head size": "head_dim",
    "experts": "n_routed_experts",
}


def read_facts(folder: Path, tensor_names: frozenset[str]) -> ModelFacts:
    """Return what config.json and the tokenizer's files in `folder` say; `tensor_names` tell whether there is a head."""
    config = read_config(folder)
    text = config.get("text_config")
    inner = {**config, **text} if isinstance(text, Mapping) else config
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    tied = inner.get("tie_word_embeddings")
    return ModelFacts(
        architecture=str(first) if first else "unknown",
        context=_count(inner.get("max_position_embeddings")),
        vocabulary=_count(inner.get("vocab_size")),
        sizes={word: count for word, key in _SIZES.items() if (count := _count(inner.get(key))) is not None},
        tied=None if not tensor_names else _HEAD not in tensor_names and tied is not False,
        chat_template=read_template(folder),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of `folder`, empty where there is none."""
    return read_json(contained(folder, "config.json")) if (folder / "config.json").is_file() else {}


def read_template(folder: Path) -> str | None:
    """Return the chat template of a model folder (of several the default one, else the first), None without one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        with open(contained(folder, file.name), "rb") as opened:
            data = opened.read(MAX_TEMPLATE_BYTES + 1)
        if len(data) > MAX_TEMPLATE_BYTES:
            raise InputError(f"{file} has more than {MAX_TEMPLATE_BYTES} bytes; that is no chat template")
        return data.decode("utf-8", "replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = read_json(contained(folder, name)).get("chat_template") if (folder / name).is_file() else None
        if isinstance(value, list):
            named = {str(item.get("name")): item.get("template") for item in value if isinstance(item, Mapping)}
            value = named.get("default", next(iter(named.values()), None))
        if isinstance(value, str):
            return value
    return None


def shown_config(config: Mapping[str, Any], depth: int = 0) -> dict[str, Shown]:
    """Return config.json flat (`rope_parameters.rope_theta`), as metadata is shown: what is long or deeply nested is shortened."""
    shown: dict[str, Shown] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value and depth < _MAX_DEPTH:
            shown |= {f"{key}.{inner}": item for inner, item in shown_config(value, depth + 1).items()}
        elif isinstance(value, list):
            shown[key] = shortened([_scalar(item) for item in value])
        else:
            shown[key] = _scalar(value)
    return shown


def _scalar(value: object) -> Shown:
    """Return a number, a truth value or a text (shortened) as it is, and a container as a mark that there is one."""
    if isinstance(value, str):
        return value[:_MAX_TEXT]
    if isinstance(value, Mapping | list):
        brackets = "{}" if isinstance(value, Mapping) else "[]"
        return f"{brackets[0]}…{brackets[1]}" if value else brackets
    return value if value is None or isinstance(value, int | float) else str(value)


def _count(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
