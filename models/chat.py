"""Chat templates: a conversation as the text that the model was trained on, rendered in a bounded sandbox.

What a template is given is what transformers gives it (`apply_chat_template`): messages, add_generation_prompt, the special
tokens, `raise_exception`, `strftime_now`, and JSON that is not escaped for HTML.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateError

from r1q.core.errors import InputError
from r1q.models.budget import Budget
from r1q.models.sandbox import BUDGET, BoundedEnvironment

MAX_TEMPLATE = 128 << 10
MAX_OUTPUT = 16 << 20
_WORK = 4 << 20
_WORK_PER_INPUT = 64
_INPUT_LIMIT = 64 << 20
_MAX_STRFTIME = 64


def render_chat(template: str, variables: Mapping[str, Any], now: datetime | None = None) -> str:
    """Return `template` rendered with `variables` (messages, add_generation_prompt, bos_token, tools, …).

    `now` is what `strftime_now` formats (the clock without it). Raises `InputError` for a template that is too large, is
    malformed, reaches for Python's internals, works or writes too much, or itself refuses the conversation (`raise_exception`).
    """
    if len(template) > MAX_TEMPLATE:
        raise InputError(
            f"the chat template has {len(template)} characters, more than {MAX_TEMPLATE}; take the model's original one"
        )
    compiled = _compile(template)
    plain = {name: _plain(value) for name, value in variables.items()}
    budget = Budget(_WORK + _WORK_PER_INPUT * _weight(plain), step=32 + len(template) // 8)
    helpers = {"raise_exception": _raise_exception, "strftime_now": _Clock(now), BUDGET: budget}
    pieces: list[str] = []
    size = 0
    try:
        for piece in compiled.generate({**plain, **helpers}):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT:
                raise SecurityError(f"it writes more than {MAX_OUTPUT} characters")
    except SecurityError as error:
        raise InputError(f"the chat template is not safe: {error}; take the model's original one") from error
    except Exception as error:  # whatever a template stumbles over is the template's fault
        raise InputError(f"the chat template cannot render this conversation: {_one_line(error)}") from error
    return "".join(pieces)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    try:
        return BoundedEnvironment().from_string(template)
    except Exception as error:  # malformed templates fail in the lexer, the parser or Python's compiler
        raise InputError(
            f"the chat template is malformed: {_one_line(error)}; take the model's original one"
        ) from error


def _plain(value: Any) -> Any:
    """Return `value` rebuilt of JSON's types only: objects have methods that no sandbox knows."""
    if value is None or isinstance(value, bool | int | float | str):
        return str.__str__(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise ValueError(f"a {type(value).__name__} in a conversation; only JSON's types can be rendered")


def _weight(value: Any) -> int:
    measure = Budget(_INPUT_LIMIT, step=0)
    try:
        measure.weigh(value)
    except SecurityError:
        raise InputError(f"the conversation has more than {_INPUT_LIMIT} characters; shorten it") from None
    return _INPUT_LIMIT - measure.units


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


class _Clock:
    """`strftime_now`: the date as the template wants it spelled."""

    def __init__(self, now: datetime | None) -> None:
        self._now = now

    def __call__(self, spelling: object) -> str:
        text = str(spelling)
        if len(text) > _MAX_STRFTIME or any(character.isdigit() for character in text.replace(" ", "")):
            raise SecurityError("it formats the date with widths")
        return (self._now or datetime.now().astimezone()).strftime(text)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
