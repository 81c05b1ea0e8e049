"""The shapes of what is sent, for /openapi.json, which generators of clients and testers read; `replies` makes the bodies."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """One error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetail


class Health(BaseModel):
    """Whether new requests are taken."""

    status: Literal["ok", "stopping"]


class ModelCard(BaseModel):
    """A model that is served; `max_model_len` is its context in tokens."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class CachedTokens(BaseModel):
    """Tokens of the prompt that were still held from an earlier request."""

    cached_tokens: int


class ReasoningTokens(BaseModel):
    """Tokens of the answer that were thinking."""

    reasoning_tokens: int


class UsageBody(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class AnswerMessage(BaseModel):
    """The answer, and what was thought before it."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    """The one answer."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The body of a chat request's answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class TextChoice(BaseModel):
    """The one completion."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(BaseModel):
    """The body of a completion request's answer."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageBody
