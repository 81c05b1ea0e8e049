"""The service: from a request to a job. Prompts are rendered and encoded here, limits checked, defaults filled in."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from r1q.core.errors import InputError
from r1q.export.gguf_metadata import is_r1_template
from r1q.models.chat import render_chat
from r1q.serve.engine import Engine
from r1q.serve.jobs import Event, Job, Refused
from r1q.serve.meters import Meters
from r1q.serve.sampling import Sampling
from r1q.serve.speech import CLOSE, OPEN, Speech, Thinking
from r1q.serve.wire import ChatRequest, CompletionRequest

_SEEDS = 1 << 64
Deliver = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One model being served: its `name` for clients, the engine, what it counts, and when (Unix time) it began."""

    name: str
    engine: Engine
    meters: Meters
    created: int

    def chat_job(self, asked: ChatRequest, deliver: Deliver) -> Job:
        """Return the job of a chat request. Raises `Refused` (400, 404) for what cannot be answered."""
        self._check_model(asked.model)
        messages = [message.plain() for message in asked.messages]
        text, thinking = self._chat_prompt(messages, asked.chat_template_kwargs or {})
        prompt = self.engine.session.encode(text)
        return self._job(asked, prompt, Speech(thinking, asked.stops), deliver)

    def completion_job(self, asked: CompletionRequest, deliver: Deliver) -> Job:
        """Return the job of a completion request; a text gets the model's BOS before it unless it begins with it."""
        self._check_model(asked.model)
        given: Sequence[str | int] = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        texts = [item for item in given if isinstance(item, str)]
        if texts:
            prompt = self.engine.session.encode(texts[0])
            bos = self.engine.session.bos
            if bos is not None and prompt[:1] != [bos]:
                prompt = [bos, *prompt]
        else:
            prompt = [item for item in given if isinstance(item, int)]
            self._check_ids(prompt, "prompt")
        if not prompt:
            raise _invalid("the prompt is empty", "prompt")
        return self._job(asked, prompt, Speech("never", asked.stops), deliver)

    def _chat_prompt(self, messages: list[dict[str, Any]], more: Mapping[str, Any]) -> tuple[str, Thinking]:
        r"""Return the conversation as text and whether it ends inside a thought, which R1's always does: `<think>\n` is forced."""
        vocabulary = self.engine.vocabulary
        if vocabulary.template is None:
            raise _invalid("this model has no chat template; use /v1/completions", "messages")
        given = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos, "add_generation_prompt": True, **more}
        try:
            text = render_chat(vocabulary.template, {**given, "messages": messages})
        except InputError as error:
            raise _invalid(str(error), "messages") from error
        if is_r1_template(vocabulary.template) and not text.rstrip().endswith((OPEN, CLOSE)):
            text += f"{OPEN}\n"
        return text, "open" if text.rstrip().endswith(OPEN) else "maybe"

    def _job(self, asked: ChatRequest | CompletionRequest, prompt: list[int], speech: Speech, deliver: Deliver) -> Job:
        room = self.engine.session.context - len(prompt)
        limit = asked.limit if asked.limit is not None else room
        if room < 1 or limit > room:
            raise _too_long(self.engine.session.context, len(prompt), asked.limit)
        vocabulary = self.engine.vocabulary
        biases = {int(token): bias for token, bias in (asked.logit_bias or {}).items()}
        self._check_ids(biases, "logit_bias")
        sampling = Sampling(
            temperature=vocabulary.temperature if asked.temperature is None else asked.temperature,
            top_p=vocabulary.top_p if asked.top_p is None else asked.top_p,
            frequency_penalty=asked.frequency_penalty or 0.0,
            presence_penalty=asked.presence_penalty or 0.0,
            biases=biases,
        )
        seed = secrets.randbits(64) if asked.seed is None else asked.seed % _SEEDS
        return Job(
            prompt=prompt,
            limit=limit,
            sampling=sampling,
            speech=speech,
            chance=np.random.default_rng(seed),
            deliver=deliver,
            top=asked.top,
            ignore_ends=asked.ignore_eos,
            whole=not asked.stream,
        )

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            message = f"this server has no model {name!r}; it has {self.name!r}"
            raise Refused(404, "invalid_request_error", message, code="model_not_found", param="model")

    def _check_ids(self, tokens: Sequence[int] | Mapping[int, float], param: str) -> None:
        size = self.engine.vocabulary.size
        if tokens and not 0 <= min(tokens) <= max(tokens) < size:
            raise _invalid(f"{param} has a token id outside the vocabulary of {size}", param)


def _invalid(message: str, param: str) -> Refused:
    return Refused(400, "invalid_request_error", message, param=param)


def _too_long(context: int, prompt: int, limit: int | None) -> Refused:
    wanted = "" if limit is None else f" and {limit} for the answer"
    return Refused(
        400,
        "invalid_request_error",
        f"this model's context is {context} tokens, and the prompt has {prompt}{wanted}; shorten it or ask for fewer",
        code="context_length_exceeded",
        param="messages" if limit is None else "max_tokens",
    )
