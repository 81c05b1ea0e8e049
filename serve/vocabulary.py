"""What tokens say: the bytes of each, which ones end an answer, and the model's chat template, from the artifact itself.

A server streams bytes before it knows whether they are whole characters; so tokens are spelled as bytes here, not as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError
from r1q.core.gguf_file import GgufFile, Strings
from r1q.export.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_vocabulary,
)
from r1q.models.config import read_json
from r1q.models.tokenizer import Tokenizer

# Tokens that end a turn by their text, as llama.cpp knows them: a file often names only one of those its template uses.
END_TEXTS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "<EOT>", "</s>",
    "<｜end▁of▁sentence｜>",
))  # fmt: skip
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SILENT = (CONTROL, UNKNOWN, UNUSED)
_R1_TEMPERATURE, _R1_TOP_P = 0.6, 0.95


def _byte_letters() -> dict[int, str]:
    """Return GPT-2's table, code point to character of its byte: printable bytes are themselves, the rest sit from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {256 + i: chr(byte) for i, byte in enumerate(others)}


_LETTERS = _byte_letters()


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens of one model. `size` is how many the tokenizer has; rows of logits may be longer, and what lies beyond spells nothing.

    `bos` and `eos` are the texts a chat template is given; `template` is None where the model has none. `temperature` and `top_p`
    are the file's own recommendation, or else DeepSeek-R1's.
    """

    model: str
    tokens: Sequence[str]
    types: Sequence[int]
    ends: frozenset[int]
    template: str | None
    bos: str
    eos: str
    temperature: float
    top_p: float
    _spelled: dict[int, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.tokens)

    def spell(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text: none for a control token or an id without a token."""
        found = self._spelled.get(token)
        if found is None:
            found = self._spelled[token] = self._spell(token)
        return found

    def name(self, token: int) -> str:
        """Return a token as a reader of log-probabilities sees it: its text, or its own name where it is a control token."""
        spelled = self.spell(token)
        return spelled.decode("utf-8", errors="replace") if spelled or token >= self.size else self.tokens[token]

    def _spell(self, token: int) -> bytes:
        if not 0 <= token < self.size or (kind := self.types[token]) in _SILENT:
            return b""
        text = self.tokens[token]
        if kind == USER_DEFINED:
            return text.encode()
        if self.model == "llama":
            if kind == BYTE:
                return bytes((int(text[3:5], 16),))
            return text.replace("▁", " ").encode()
        try:
            return text.translate(_LETTERS).encode("latin-1")
        except UnicodeEncodeError:  # not spelled in GPT-2's letters: as it stands
            return text.encode()


def gguf_vocabulary(path: Path) -> Vocabulary:
    """Return the vocabulary that a GGUF file carries. Raises `InputError` where it carries none that can be spelled."""
    file = GgufFile.open(path)
    model, tokens = file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.tokens")
    types = file.metadata.get("tokenizer.ggml.token_type")
    if model not in ("gpt2", "llama") or not isinstance(tokens, Strings):
        raise InputError(
            f"{path}: its tokenizer is {model!r}; r1q serve spells byte-level BPE (gpt2) and SentencePiece (llama)"
        )
    kinds = types.tolist() if isinstance(types, np.ndarray) and types.dtype.kind in "iu" else [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise InputError(f"{path}: {len(tokens)} tokens have {len(kinds)} types; export it again")
    if model == "llama" and not all(_is_byte(tokens[index]) for index, kind in enumerate(kinds) if kind == BYTE):
        raise InputError(f"{path}: a byte token is not spelled <0xXX>; export it again")
    stated = {_id(file.metadata.get(f"tokenizer.ggml.{key}"), len(tokens)) for key in _END_KEYS}
    template = file.metadata.get("tokenizer.chat_template")
    return Vocabulary(
        model=str(model),
        tokens=tokens,
        types=kinds,
        ends=_ends(stated, tokens, kinds),
        template=template if isinstance(template, str) and template else None,
        bos=_text(file.metadata, "bos_token_id", tokens),
        eos=_text(file.metadata, "eos_token_id", tokens),
        temperature=_number(file.metadata.get("general.sampling.temp"), _R1_TEMPERATURE),
        top_p=_number(file.metadata.get("general.sampling.top_p"), _R1_TOP_P),
    )


def folder_vocabulary(folder: Path) -> Vocabulary:
    """Return the vocabulary of a folder with Hugging Face's tokenizer files. Raises `InputError` where they cannot be spelled."""
    tokenizer = Tokenizer.open(folder)
    read = read_vocabulary(folder, tokenizer.vocab_size)
    said: Mapping[str, Any] = {}
    if (folder / "generation_config.json").is_file():
        said = read_json(folder / "generation_config.json")
    listed = said.get("eos_token_id")
    ids = listed if isinstance(listed, list) else [listed]
    stated = {_id(value, len(read.tokens)) for value in (*ids, tokenizer.eos_id)}
    return Vocabulary(
        model=read.model,
        tokens=read.tokens,
        types=read.types,
        ends=_ends(stated, read.tokens, read.types),
        template=tokenizer.chat_template,
        bos=tokenizer.bos_token or "",
        eos=tokenizer.eos_token or "",
        temperature=_number(said.get("temperature"), _R1_TEMPERATURE),
        top_p=_number(said.get("top_p"), _R1_TOP_P),
    )


def checkpoint_vocabulary(path: Path) -> Vocabulary:
    """Return the vocabulary of a checkpoint of r1q, which keeps its model's tokenizer beside the codes."""
    return folder_vocabulary(QuantizedCheckpoint.open(path).sidecar)


VOCABULARIES = MappingProxyType({"gguf": gguf_vocabulary, "checkpoint": checkpoint_vocabulary})


def open_vocabulary(path: Path, format_name: str) -> Vocabulary:
    """Return the vocabulary of an artifact: that inside a GGUF file or checkpoint, else the tokenizer beside the others."""
    reader = VOCABULARIES.get(format_name)
    return reader(path) if reader else folder_vocabulary(path if path.is_dir() else path.parent)


def _ends(stated: set[int | None], tokens: Sequence[str], types: Sequence[int]) -> frozenset[int]:
    named = {
        index for index, text in enumerate(tokens) if text in END_TEXTS and types[index] in (CONTROL, USER_DEFINED)
    }
    return frozenset(named | {token for token in stated if token is not None})


def _id(value: object, size: int) -> int | None:
    return value if type(value) is int and 0 <= value < size else None


def _text(metadata: Mapping[str, object], key: str, tokens: Sequence[str]) -> str:
    token = _id(metadata.get(f"tokenizer.ggml.{key}"), len(tokens))
    return "" if token is None else tokens[token]


def _number(value: object, default: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 2
    return float(value) if good else default  # type: ignore[arg-type]


def _is_byte(text: str) -> bool:
    try:
        return len(text) == 6 and text.startswith("<0x") and text.endswith(">") and int(text[3:5], 16) >= 0
    except ValueError:
        return False
