"""Tokenizer: text to token ids and back, as `tokenizer.json` and `tokenizer_config.json` say; never code of the checkpoint.

What is put around a text follows llama.cpp's converter and transformers 4: `add_bos_token` and `add_eos_token` of
tokenizer_config.json, where they are said, overrule the post-processor of tokenizer.json. (transformers 5 ignores them, and so
loses the beginning-of-text token of DeepSeek-R1-Distill-Qwen, whose post-processor does not know it.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers

from r1q.core.errors import InputError
from r1q.models.config import read_json
from r1q.models.source import contained

MAX_TOKENIZER_BYTES = 64 << 20
_MEND = "fetch it again from the model's page"


class Tokenizer:
    """An opened tokenizer. `bos_id` and `eos_id` are None where the model has none; `chat_template` is None without one."""

    def __init__(
        self, folder: Path, backend: tokenizers.Tokenizer, settings: Mapping[str, Any], template: str | None
    ) -> None:
        self.folder, self.chat_template = folder, template
        self._backend = backend
        self.bos_token, self.eos_token = (_special(settings, key) for key in ("bos_token", "eos_token"))
        self.bos_id, self.eos_id = self._id(self.bos_token), self._id(self.eos_token)
        self._around = self._said_around(settings)
        self.vocab_size: int = backend.get_vocab_size()
        self.adds_bos = self.bos_id is not None and self.encode("a", add_special=True)[:1] == [self.bos_id]

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """Open the tokenizer of a model folder. Raises `InputError` for a missing, oversized or malformed file."""
        settings = _settings(folder)
        return cls(folder, _backend(folder), settings, _chat_template(folder, settings))

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Return the ids of `text`; `add_special` puts around it what the model expects around a text (usually BOS).

        Special tokens spelled out in `text` become their ids.
        """
        plain = add_special and self._around is None
        ids: list[int] = self._backend.encode(text, add_special_tokens=plain).ids
        if not add_special or self._around is None:
            return ids
        before, after = self._around
        return [*before, *ids, *after]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def token_id(self, token: str) -> int | None:
        """Return the id of one token by its text, None when there is no such token."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        now: datetime | None = None,
        **variables: Any,
    ) -> str:
        """Return the conversation as text (encode it with `add_special=False`: templates spell their BOS themselves).

        `variables` are passed on to the template (tools, enable_thinking, …). Raises `InputError` where there is no template
        or it refuses (see `models.chat.render_chat`).
        """
        from r1q.models.chat import render_chat

        if self.chat_template is None:
            raise InputError(f"{self.folder} has no chat template; give the prompt as plain text")
        tokens = {"bos_token": self.bos_token or "", "eos_token": self.eos_token or ""}
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt, **tokens, **variables}
        return render_chat(self.chat_template, given, now)

    def _said_around(self, settings: Mapping[str, Any]) -> tuple[list[int], list[int]] | None:
        """Return the ids before and after a text, None where tokenizer_config.json leaves both to the post-processor."""
        said = [settings.get(key) for key in ("add_bos_token", "add_eos_token")]
        if not any(isinstance(value, bool) for value in said):
            return None
        plain: list[int] = self._backend.encode("a", add_special_tokens=False).ids
        full: list[int] = self._backend.encode("a", add_special_tokens=True).ids
        processed = (
            full[:1] != plain[:1] and full[0] == self.bos_id,
            full[-1:] != plain[-1:] and full[-1] == self.eos_id,
        )
        bos, eos = (
            value if isinstance(value, bool) else default for value, default in zip(said, processed, strict=True)
        )
        before = [self.bos_id] if bos and self.bos_id is not None else []
        return before, [self.eos_id] if eos and self.eos_id is not None else []

    def _id(self, token: str | None) -> int | None:
        found = None if token is None else self.token_id(token)
        if token is not None and found is None:
            raise InputError(f"{self.folder}: the special token {token!r} is not in tokenizer.json; {_MEND}")
        return found


def _backend(folder: Path) -> tokenizers.Tokenizer:
    path = contained(folder, "tokenizer.json")
    if not path.is_file():
        hint = (
            " (tokenizer.model alone: convert it once with transformers)"
            if (folder / "tokenizer.model").is_file()
            else ""
        )
        raise InputError(f"{path} is missing{hint}; {_MEND}")
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise InputError(f"{path} has more than {MAX_TOKENIZER_BYTES} bytes; that is no tokenizer")
    try:
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())  # from_str keeps 19 MB more of a 3.5 MB file
        backend.no_truncation()  # stored in the file by whoever used it last
        backend.no_padding()
        backend.encode("a")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust side panics on some malformed files, and a panic is no Exception
        raise InputError(f"{path} is not a readable tokenizer ({' '.join(str(error).split())}); {_MEND}") from error
    return backend


def _settings(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, with special tokens that only the older special_tokens_map.json names."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= {key: value for key, value in read_json(contained(folder, name)).items() if value is not None}
    return settings


def _special(settings: Mapping[str, Any], key: str) -> str | None:
    value = settings.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the chat template: of chat_template.jinja, else chat_template.json, else tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        from r1q.models.chat import MAX_TEMPLATE

        data = contained(folder, file.name).read_bytes()[: 4 * MAX_TEMPLATE + 1]
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text; {_MEND}") from error
    legacy = folder / "chat_template.json"
    value = (
        read_json(contained(folder, legacy.name)).get("chat_template")
        if legacy.is_file()
        else settings.get("chat_template")
    )
    if isinstance(value, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    if not isinstance(value, str | None):
        raise InputError(f"{folder}: chat_template is not text; {_MEND}")
    return value
