"""What a parcel says of its model: read from the artifact itself, the checkpoint's manifest, and the source's card if it is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from r1q.core.artifact import find_reference
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.gguf_file import GgufFile, Strings
from r1q.core.untrusted import printable

_CARD_BYTES = 1 << 20
R1_TEMPERATURE, R1_TOP_P = 0.6, 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What one GGUF file says: its sampling settings, special texts, chat template, and the bytes of a token's keys and values."""

    temperature: float
    top_p: float
    bos: str
    eos: str
    adds_bos: bool
    template: str | None
    context: int
    cache_bytes: int


def gguf_facts(path: Path) -> ModelFacts:
    """Return the facts of a GGUF file. Raises `InputError` for one that our reader refuses."""
    file = GgufFile.open(path)
    arch, metadata = file.architecture, file.metadata

    def number(key: str, default: int) -> int:
        value = metadata.get(f"{arch}.{key}", default)
        return value if isinstance(value, int) else default

    heads = max(1, number("attention.head_count", 1))
    width = number("attention.key_length", number("embedding_length", 0) // heads)
    tokens = metadata.get("tokenizer.ggml.tokens")
    template = metadata.get("tokenizer.chat_template")
    return ModelFacts(
        temperature=_setting(metadata.get("general.sampling.temp"), R1_TEMPERATURE),
        top_p=_setting(metadata.get("general.sampling.top_p"), R1_TOP_P),
        bos=_token(metadata.get("tokenizer.ggml.bos_token_id"), tokens),
        eos=_token(metadata.get("tokenizer.ggml.eos_token_id"), tokens),
        adds_bos=metadata.get("tokenizer.ggml.add_bos_token") is True,
        template=template if isinstance(template, str) and template else None,
        context=max(2, number("context_length", 2048)),
        # Keys and values of 16 bits for every block.
        cache_bytes=2 * 2 * number("block_count", 1) * number("attention.head_count_kv", heads) * width,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the model comes from. `base` is its id or name; `license` its card's word, empty where nothing is known.

    `texts` are the licence files that lay beside the source, to be passed on.
    """

    base: str
    license: str
    license_name: str = ""
    license_link: str = ""
    bases: tuple[str, ...] = ()
    texts: tuple[Path, ...] = ()


def find_origin(output: Path, checkpoint: QuantizedCheckpoint) -> Origin:
    """Return what the manifest and, where it is still on this machine, the source folder say of where the model is from."""
    origin = checkpoint.manifest.get("origin")
    repository = origin.get("repository") if isinstance(origin, Mapping) else None
    source = find_reference(output)
    card = read_card(source / "README.md") if source else {}
    texts = [] if source is None else sorted(path for path in source.iterdir() if _is_license(path))
    named = card.get("base_model")
    bases = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    return Origin(
        base=str(repository or checkpoint.model_name),
        license=_word(card.get("license")),
        license_name=_word(card.get("license_name")),
        license_link=_word(card.get("license_link")),
        bases=tuple(_word(base) for base in bases),
        texts=tuple(texts),
    )


def read_card(path: Path) -> Mapping[str, object]:
    """Return the front matter of a model card, nothing where there is none that can be read."""
    try:
        with open(path, "rb") as file:
            text = file.read(_CARD_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return {}
    if not text.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(text[4:].partition("\n---")[0])
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_license(path: Path) -> bool:
    name = path.name.lower()
    known = name.startswith(("license", "licence", "notice", "use_policy", "use-policy", "copying"))
    return known and path.is_file() and not path.is_symlink() and path.stat().st_size <= _CARD_BYTES


def _word(value: object) -> str:
    return printable(str(value))[:200] if isinstance(value, str | int | float) else ""


def _setting(value: object, default: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 2
    return round(float(value), 4) if good else default  # type: ignore[arg-type]


def _token(number: object, tokens: object) -> str:
    good = isinstance(tokens, Strings) and isinstance(number, int) and 0 <= number < len(tokens)
    return tokens[number] if good else ""  # type: ignore[index]
