"""A tokenizer.json as the metadata of a GGUF file: tokens, their types, merges, special ids, what is added, chat templates.

Byte-level BPE becomes llama.cpp's `gpt2` tokenizer. BPE over characters with byte fallback (Llama 2's) becomes its `llama`
tokenizer, whose scores are the ranks of the merges. Anything else is refused; so is what llama.cpp has no key for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1q.core.errors import InputError
from r1q.export.gguf_metadata import Entry
from r1q.models.config import read_json
from r1q.models.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's llama_token_type
TOKENIZER_JSON = "tokenizer.json"
_MAX_BYTES = 1 << 28
_UNMERGED_SCORE = -1e9  # below every rank: a token that no merge makes never wins over one that a merge makes
# What a tokenizer's settings and config.json call a special token -> what GGUF calls its id (sic: seperator).
_SPECIAL_KEYS: Mapping[str, str] = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens by id with llama.cpp's types, and either merges (`gpt2`) or scores (`llama`)."""

    model: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]


def read_tokenizer_json(folder: Path) -> dict[str, Any]:
    """Return the parsed tokenizer.json of `folder`; raises `InputError` where there is none that can be exported."""
    path = folder / TOKENIZER_JSON
    if not path.is_file():
        raise InputError(f"{path} is missing; GGUF files carry their tokenizer, and r1q reads it from tokenizer.json")
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(f"{path} has more than {_MAX_BYTES} bytes; that is no tokenizer")
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict) or not isinstance(value["model"], dict):
            raise InputError(f"{path} is not a tokenizer; fetch it again")
    except (ValueError, KeyError, RecursionError) as error:
        raise InputError(f"{path} is not readable ({error!r}); fetch it again") from error
    return value


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Return the vocabulary of `folder`, filled up to `size` ids (the rows of the embedding) with unused tokens.

    Raises `InputError` for a kind of tokenizer that llama.cpp would read differently, with the reason.
    """
    path = folder / TOKENIZER_JSON
    data = read_tokenizer_json(folder)
    model = tokenizer_kind(data, path)
    vocab, added = _ids(data, path)
    tokens = {number: text for text, number in vocab.items()}
    types = dict.fromkeys(tokens, NORMAL)
    for token in added:
        text, number = token["content"], token["id"]
        special = token.get("special") is True or _looks_special(text)
        tokens[number], types[number] = text, CONTROL if special else USER_DEFINED
    if model == "llama":
        _type_bytes_and_unknown(data, tokens, types)
    if max(tokens, default=0) >= size:
        raise InputError(
            f"{path}: token id {max(tokens)} has no row in the embedding of {size}; tokenizer and weights differ"
        )
    listed = [tokens.get(number, f"[PAD{number}]") for number in range(size)]
    if len(set(listed)) != size:
        twice = next(text for text, count in Counter(listed).items() if count > 1)
        raise InputError(f"{path}: the token {twice!r} has two ids; llama.cpp takes a text for one token only")
    merges = _merges(data, path)
    return Vocabulary(
        model=model,
        tokens=listed,
        types=[types.get(number, UNUSED) for number in range(size)],
        merges=[f"{_no_space(left)} {_no_space(right)}" for left, right in merges] if model == "gpt2" else [],
        scores=_scores(listed, merges) if model == "llama" else [],
    )


def tokenizer_kind(data: Mapping[str, Any], path: Path) -> str:
    """Return llama.cpp's name (`gpt2` or `llama`) for the kind of tokenizer, or raise `InputError` with what is in the way."""
    model = data["model"]
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise InputError(f"{path}: a {kind} tokenizer; r1q writes byte-level BPE and Llama 2's BPE into GGUF")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise InputError(f"{path}: BPE with {key} = {model[key]!r}, for which llama.cpp has no equal")
    normalizer = flat_steps(data.get("normalizer"), "normalizers")
    steps = flat_steps(data.get("pre_tokenizer"), "pretokenizers")
    if any(step.get("type") == "ByteLevel" for step in steps) and not model.get("byte_fallback"):
        strange = [step for step in normalizer if step.get("type") != "NFC"]
        if strange:
            raise InputError(f"{path}: the normalizer {strange[0].get('type')!r} changes texts; llama.cpp would not")
        return "gpt2"
    if model.get("byte_fallback") and _is_llama2(normalizer, steps):
        return "llama"
    raise InputError(
        f"{path}: neither byte-level BPE nor Llama 2's BPE with byte fallback; llama.cpp would read it differently"
    )


def normalizes_to_nfc(data: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer composes characters (Unicode NFC) before it splits; llama.cpp never does."""
    return any(step.get("type") == "NFC" for step in flat_steps(data.get("normalizer"), "normalizers"))


def tokenizer_entries(folder: Path, size: int, pre: str, tokenizer: Tokenizer) -> Iterator[Entry]:
    """Yield every `tokenizer.*` key; `pre` is the pre-tokenizer's name, `tokenizer` the opened tokenizer of `folder`."""
    vocabulary = read_vocabulary(folder, size)
    yield Entry("tokenizer.ggml.model", vocabulary.model, "str")
    yield Entry("tokenizer.ggml.pre", pre, "str")
    yield Entry("tokenizer.ggml.tokens", vocabulary.tokens, "arr[str]")
    if vocabulary.scores:
        yield Entry("tokenizer.ggml.scores", vocabulary.scores, "arr[f32]")
    yield Entry("tokenizer.ggml.token_type", vocabulary.types, "arr[i32]")
    if vocabulary.merges:
        yield Entry("tokenizer.ggml.merges", vocabulary.merges, "arr[str]")
    settings = _optional_json(folder / "tokenizer_config.json")
    ids = _special_ids(settings, _optional_json(folder / "config.json"), tokenizer, size)
    for name, key in _SPECIAL_KEYS.items():
        if name in ids:
            yield Entry(f"tokenizer.ggml.{key}", ids[name], "u32")
    yield from _added_entries(folder, tokenizer, ids)
    if vocabulary.model == "llama":
        yield Entry("tokenizer.ggml.add_space_prefix", _adds_space(read_tokenizer_json(folder)), "bool")
    yield from _template_entries(tokenizer.chat_template, settings.get("chat_template"))


def _added_entries(folder: Path, tokenizer: Tokenizer, ids: Mapping[str, int]) -> Iterator[Entry]:
    """Yield what the tokenizer really puts around a text, found by encoding one; llama.cpp knows one id on each side."""
    text = "0"
    plain, full = tokenizer.encode(text, add_special=False), tokenizer.encode(text, add_special=True)
    bos = full != plain and full[:1] == [ids.get("bos")]
    rest = full[1:] if bos else full
    eos = rest != plain and rest[-1:] == [ids.get("eos")]
    if (rest[:-1] if eos else rest) != plain:
        raise InputError(
            f"{folder / TOKENIZER_JSON}: it puts {full} around {plain}; a GGUF file can only say that BOS or EOS is added"
        )
    yield Entry("tokenizer.ggml.add_bos_token", bos, "bool")
    if eos:
        yield Entry("tokenizer.ggml.add_eos_token", True, "bool")


def _template_entries(default: str | None, listed: object) -> Iterator[Entry]:
    """Yield the default chat template, and the others where the settings list several by name."""
    if default:
        yield Entry("tokenizer.chat_template", default, "str")
    items = [item for item in listed if isinstance(item, Mapping)] if isinstance(listed, list) else []
    named = {str(item.get("name")): item.get("template") for item in items if item.get("name") not in (None, "default")}
    others = {name: template for name, template in named.items() if isinstance(template, str) and template}
    for name, template in others.items():
        yield Entry(f"tokenizer.chat_template.{name}", template, "str")
    if others:
        yield Entry("tokenizer.chat_templates", list(others), "arr[str]")


def _special_ids(
    settings: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Tokenizer, size: int
) -> dict[str, int]:
    """Return special ids by GGUF's short names: the tokenizer's own where it names a token, else those of config.json."""
    found: dict[str, int] = {}
    for name in _SPECIAL_KEYS:
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        own = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}.get(name)
        number = own if own is not None else tokenizer.token_id(text) if isinstance(text, str) else None
        number = config.get(f"{name}_token_id") if number is None else number
        if type(number) is int and 0 <= number < size:
            found[name] = number
    return found


def _optional_json(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}


def _ids(data: Mapping[str, Any], path: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    vocab, added = data["model"].get("vocab"), data.get("added_tokens") or []
    good = isinstance(vocab, dict) and all(type(number) is int and number >= 0 for number in vocab.values())
    if not good or len(set(vocab.values())) != len(vocab):
        raise InputError(f"{path}: model.vocab does not give each token an id of its own")
    for token in added:
        if not isinstance(token, dict) or type(token.get("id")) is not int or not isinstance(token.get("content"), str):
            raise InputError(f"{path}: added_tokens has an entry without id and content")
        if token["id"] < 0 or vocab.get(token["content"], token["id"]) != token["id"]:
            raise InputError(f"{path}: the added token {token['content']!r} has another id in model.vocab")
    return vocab, added


def _merges(data: Mapping[str, Any], path: Path) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for merge in data["model"].get("merges") or []:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
            raise InputError(f"{path}: the merge {merge!r} is not a pair of tokens")
        pairs.append((parts[0], parts[1]))
    return pairs


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """Return minus the rank of the first merge that makes each token: llama.cpp merges the best score first, as BPE the rank."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else _UNMERGED_SCORE for token in tokens]


def _type_bytes_and_unknown(data: Mapping[str, Any], tokens: Mapping[int, str], types: dict[int, int]) -> None:
    letters = {f"<0x{byte:02X}>" for byte in range(256)}
    unknown = data["model"].get("unk_token")
    for number, text in tokens.items():
        if text in letters:
            types[number] = BYTE
        elif text == unknown:
            types[number] = UNKNOWN


def _is_llama2(normalizer: list[Mapping[str, Any]], steps: list[Mapping[str, Any]]) -> bool:
    """Return whether spaces become ▁ and nothing else happens, in either spelling (normalizer, or Metaspace)."""
    known = {"Prepend": {"prepend": "▁"}, "Replace": {"pattern": {"String": " "}, "content": "▁"}}
    simple = all(
        known.get(str(step.get("type"))) == {k: v for k, v in step.items() if k != "type"} for step in normalizer
    )
    if steps:
        # With any other scheme Metaspace adds no space before a text that begins with one; llama.cpp always adds it.
        whole = {"type": "Metaspace", "split": False, "prepend_scheme": "never"}
        return not normalizer and len(steps) == 1 and whole.items() <= steps[0].items()
    return simple and any(step.get("type") == "Replace" for step in normalizer)


def _adds_space(data: Mapping[str, Any]) -> bool:
    steps = flat_steps(data.get("normalizer"), "normalizers")
    return any(step.get("type") == "Prepend" for step in steps)


def flat_steps(value: object, inner: str) -> list[Mapping[str, Any]]:
    """Return a normalizer or pre-tokenizer as a flat list of steps."""
    if not isinstance(value, Mapping):
        return []
    if value.get("type") != "Sequence":
        return [value]
    return [step for item in value.get(inner) or [] for step in flat_steps(item, inner)]


def _looks_special(text: str) -> bool:
    """Return whether llama.cpp's converter takes an added token for a control token though it is not marked special."""
    framed = (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))
    return framed or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def _no_space(part: str) -> str:
    """Return one side of a merge with spaces spelled as byte-level BPE spells them: llama.cpp splits a merge at its space."""
    return part.replace(" ", "Ġ")
