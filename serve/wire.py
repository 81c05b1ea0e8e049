"""What clients may send: OpenAI's request bodies as far as they are honoured, and the refusal of what would be ignored in silence.

Fields without any effect on the answer (`user`, `metadata`, …) are let through; one that asks for something this server does not do
(tools, several choices, images) is refused, so that nobody takes its absence for the model's decision.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_TOKENS = 1 << 24
MOST_STOPS = 16
MOST_BIASES = 1024
MOST_MESSAGES = 4096
# Names of the template's own variables, which `chat_template_kwargs` may not set.
RESERVED = frozenset(("messages", "add_generation_prompt", "bos_token", "eos_token"))

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(_Strict):
    """A piece of a message's content: text is all that these models read."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message. `developer` is read as `system`; `reasoning_content` of an earlier answer is handed to the template."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, Any]:
        """Return the message as chat templates know it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or ())
        said = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return said if self.reasoning_content is None else {**said, "reasoning_content": self.reasoning_content}


class StreamOptions(_Strict):
    """Whether a stream ends with a chunk that tells the usage."""

    include_usage: bool = False


class _Request(_Strict):
    """What both kinds of request have. None means the model's own setting."""

    model: str | None = Field(None, max_length=512)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias] | None = Field(None, max_length=MOST_BIASES)
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    n: Literal[1] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = Field(False, description="Go on after end-of-text tokens; an extension, for measurements.")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _whole_characters(self) -> Self:
        # JSON can spell half of a surrogate pair, which is no text and cannot be encoded.
        refuse_halves(self.model_dump())
        return self


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="More variables for the chat template, such as enable_thinking; an extension.", max_length=32
    )

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def top(self) -> int | None:
        """How many likeliest tokens to score, None for no scores at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _template_variables(self) -> Self:
        taken = sorted(RESERVED & set(self.chat_template_kwargs or ()))
        if taken:
            raise ValueError(f"chat_template_kwargs sets {', '.join(taken)}, which the server sets itself")
        return self


class TextFormat(_Strict):
    """The only form of an answer: text as the model writes it."""

    type: Literal["text"]


class CompletionRequest(_Request):
    """The body of /v1/completions. A prompt is one text, or the ids of its tokens."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)] | Annotated[list[int], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = False
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens of the completion; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def top(self) -> int | None:
        """How many likeliest tokens to score, None for no scores at all."""
        return self.logprobs


ChatRequest.model_rebuild()


def refuse_halves(value: Any) -> None:
    """Raise `ValueError` for a text, however deep inside `value`, with half of a surrogate pair in it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("a text has half of a surrogate pair in it, which is no character") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            refuse_halves(key)
            refuse_halves(item)
    elif isinstance(value, list):
        for item in value:
            refuse_halves(item)
