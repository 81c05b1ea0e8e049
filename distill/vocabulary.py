"""A byte-level BPE vocabulary with most of its tokens left out: which must stay, and what the files say of the rest under new ids.

Merging takes the pair of lowest rank wherever it can. If every product of the merges that a text really takes is kept, the merges
left are a part of the old ones that holds each lowest one, so the text is cut as before. What a token took to make does not depend
on its neighbours: no merge crossed its ends. Any other text comes apart into shorter tokens, at last into bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from r1q.core.errors import InputError

_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
_ID_KEYS = ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "bad_words_ids", "force_words_ids")


def byte_alphabet() -> frozenset[str]:
    """Return the 256 characters that stand for bytes (GPT-2): printable Latin-1 for itself, the others from U+0100 on."""
    return frozenset([*map(chr, _BYTES), *(chr(256 + i) for i in range(256 - len(_BYTES)))])


def check_kind(data: Mapping[str, Any], where: Path) -> None:
    """Raise `InputError` for a tokenizer that is not byte-level BPE, or keeps ids in parts that are not known here."""
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") not in (None, "BPE") or "merges" not in model:
        kind = model.get("type") if isinstance(model, dict) else None
        raise InputError(
            f"{where}: the tokenizer is {kind!r}; only byte-level BPE can lose tokens and still spell any text"
        )
    if model.get("byte_fallback") or "ByteLevel" not in _kinds(data.get("pre_tokenizer")):
        raise InputError(
            f"{where}: the tokenizer is not byte-level (Llama 2's SentencePiece is such); it cannot be trimmed"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if model.get(key):
            raise InputError(f"{where}: model.{key} is {model[key]!r}, by which trimmed text would be cut otherwise")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(number) is int and number >= 0 for number in vocab.values()):
        raise InputError(f"{where}: model.vocab does not give each token an id")
    unknown = _kinds(data.get("post_processor")) - {"ByteLevel", "TemplateProcessing", "Sequence"}
    if unknown:
        raise InputError(f"{where}: the post-processor {min(unknown)} is not known to r1q, and may hold ids")


def _kinds(part: object) -> set[str]:
    if not isinstance(part, dict):
        return set()
    inner = [*(part.get("pretokenizers") or []), *(part.get("processors") or [])]
    return {str(part.get("type"))}.union(*map(_kinds, inner))


def pairs(merges: Sequence[object], where: Path) -> list[tuple[str, str]]:
    """Return the merges in order, from either spelling: "a b" or [a, b]."""
    found = [
        tuple(merge.split(" ") if isinstance(merge, str) else merge)
        for merge in merges
        if isinstance(merge, str | list)
    ]
    if len(found) != len(merges) or not all(len(pair) == 2 and all(isinstance(x, str) for x in pair) for pair in found):
        raise InputError(f"{where}: model.merges is not a list of pairs")
    return [(str(left), str(right)) for left, right in found]


def ancestors(token: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """Return every symbol that merging makes on the way from the characters of `token`; without a way, as far as it gets."""
    parts, made = list(token), set(token)
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        made.add(parts[at])
    return made


def kept_ids(data: Mapping[str, Any], used: Iterable[int], where: Path) -> list[int]:
    """Return, in order, the ids that must stay: `used`, every added token, every byte, and what merging makes on the way to them."""
    vocab: Mapping[str, int] = data["model"]["vocab"]
    texts = {number: text for text, number in vocab.items()}
    ranks = {pair: rank for rank, pair in enumerate(pairs(data["model"]["merges"], where))}
    added = {int(token["id"]) for token in data.get("added_tokens") or []}
    kept = {*used, *added, *(vocab[char] for char in byte_alphabet() if char in vocab)}
    for number in sorted(kept - added):
        if number in texts:
            kept |= {vocab[made] for made in ancestors(texts[number], ranks) if made in vocab}
    return sorted(kept)


def trimmed_tokenizer(data: Mapping[str, Any], new: Mapping[int, int], where: Path) -> dict[str, Any]:
    """Return tokenizer.json with the tokens of `new` alone, under their new ids, and the merges among them in their order."""
    model = data["model"]
    vocab = {text: new[number] for text, number in model["vocab"].items() if number in new}
    merges = [
        merge
        for merge, (left, right) in zip(model["merges"], pairs(model["merges"], where), strict=True)
        if left in vocab and right in vocab and left + right in vocab
    ]
    result = {**data, "model": {**model, "vocab": vocab, "merges": merges}}
    result["added_tokens"] = [{**token, "id": new[token["id"]]} for token in data.get("added_tokens") or []]
    result["post_processor"] = _renumbered(data.get("post_processor"), new)
    if isinstance(data.get("padding"), dict):
        result["padding"] = {**data["padding"], "pad_id": new[data["padding"]["pad_id"]]}
    return result


def _renumbered(part: Any, new: Mapping[int, int]) -> Any:
    if not isinstance(part, dict):
        return part
    result = dict(part)
    if "processors" in part:
        result["processors"] = [_renumbered(inner, new) for inner in part["processors"]]
    if isinstance(part.get("special_tokens"), dict):
        said = part["special_tokens"].items()
        result["special_tokens"] = {name: {**token, "ids": [new[i] for i in token["ids"]]} for name, token in said}
    return result


def settings_ids(settings: Mapping[str, Any]) -> list[int]:
    """Return the ids of tokens that config.json or generation_config.json names."""
    return [number for key, value in settings.items() if _names_ids(key) for number in _numbers(value) if number >= 0]


def trimmed_settings(settings: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return config.json, generation_config.json or tokenizer_config.json with new ids, and the new size where one is said."""
    result = {key: _mapped(value, new) if _names_ids(key) else value for key, value in settings.items()}
    if "vocab_size" in settings:
        result["vocab_size"] = len(new)
    if isinstance(settings.get("added_tokens_decoder"), dict):
        table = settings["added_tokens_decoder"].items()
        result["added_tokens_decoder"] = {str(new[int(number)]): token for number, token in table if int(number) in new}
    return result


def _names_ids(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids")) or key in _ID_KEYS


def _numbers(value: object) -> list[int]:
    if isinstance(value, list):
        return [number for part in value for number in _numbers(part)]
    return [value] if type(value) is int else []


def _mapped(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [_mapped(part, new) for part in value]
    return new.get(value, value) if type(value) is int and value >= 0 else value
