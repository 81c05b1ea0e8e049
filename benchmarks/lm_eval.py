"""EleutherAI's lm-eval over our sessions: its tasks, our runtimes.

    from lm_eval import simple_evaluate
    with load_runtime("llama-cpp").open(path, Options(context=4096, sequences=4)) as session:
        simple_evaluate(R1qLM(session, Tokenizer.open(folder)), tasks=["my_task"], …)

Likelihoods come from the session's own logits, in this process. (llama-server gives log-probabilities of generated tokens only, and
lm-eval over it scores chance without an error: EleutherAI/lm-evaluation-harness#4158.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from r1q.benchmarks.speaking import Answer, luck, speak
from r1q.benchmarks.thinking import end_ids
from r1q.calibration.conversations import DATE
from r1q.core.errors import UsageError
from r1q.core.metrics import log_softmax
from r1q.models.tokenizer import Tokenizer
from r1q.runtimes.base import Session

Tokens = Sequence[int]
Scored = tuple[float, bool]
MAX_TOKENS = 2048  # of an answer, where a task says nothing: lm-eval's own 256 end in the middle of a thought
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
TEMPERATURE, TOP_P = "temperature", "top_p"


class R1qLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A session as lm-eval's LM. `think_end` (`</think>`): answers begin after it, and a task's stops do not count before it.

    Without it the whole text is handed back, thoughts and all. What a task says of do_sample, temperature, top_p and the longest
    answer is followed; without do_sample it is greedy, as in lm-eval. `seed` draws where sampling is asked for.
    """

    backend = "causal"

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        *,
        think_end: str | None = None,
        max_tokens: int = MAX_TOKENS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.session, self.tokenizer = session, tokenizer
        self.think_end, self.max_tokens, self.seed = think_end, max_tokens, seed

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token's id. Raises UsageError where the tokenizer has none."""
        if self.tokenizer.eos_id is None:
            raise UsageError(
                f"{self.tokenizer.folder}: the tokenizer names no end-of-text token, and lm-eval needs one"
            )
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS where there is one, else the end of text."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens that one sequence can hold."""
        return self.session.context

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        return self.tokenizer.folder.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of `string`; unless told otherwise BOS is put where the tokenizer does so and it is not there yet."""
        spelled = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)
        return self.tokenizer.encode(
            string, add_special=not spelled if add_special_tokens is None else add_special_tokens
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation in the model's own template, rendered in the sandbox."""
        return self.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt, now=DATE)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template's text, for lm-eval's log."""
        return self.tokenizer.chat_template if chat_template else None

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, Tokens, Tokens]], **_: Any) -> list[Scored]:
        """Return each continuation's log-likelihood and whether greedy decoding would write it; equal inputs are computed once."""
        found: dict[int, Scored] = {}
        groups: dict[tuple[tuple[int, ...], int], list[tuple[int, Tokens]]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UsageError(
                    f"a continuation has {len(continuation)} tokens, the context {self.max_length}: open it with more"
                )
            given = tuple([*context, *continuation][-(self.max_length + 1) :][:-1])
            groups.setdefault((given, len(given) - len(continuation)), []).append((place, continuation))
        for (given, first), members in groups.items():
            rows = log_softmax(self.session.logits(given, first=first))
            best = rows.argmax(axis=1)
            for place, continuation in members:
                ids = np.asarray(continuation)
                found[place] = float(rows[np.arange(len(ids)), ids].sum()), bool((best == ids).all())
                if (words := requests[place][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", words, found[place])
        return [found[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return each text's log-likelihood, every token predicted once, in windows as long as the context."""
        totals = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum((value for value, _ in self._loglikelihood_tokens(parts)), 0.0))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return each request's answer, up to the first of its stops; `session.sequences` are written side by side."""
        answers = [self._answer(*request.args) for request in requests]
        for _ in speak(self.session, answers, vocab=self.tokenizer.vocab_size, ends=end_ids(self.tokenizer)):
            pass
        texts = [
            self._cut(answer.said, _stops(request.args[1]))[0]
            for answer, request in zip(answers, requests, strict=True)
        ]
        for text, request in zip(texts, requests, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _answer(self, prompt: str, settings: Mapping[str, Any]) -> Answer:
        longest = next((int(settings[name]) for name in LIMITS if settings.get(name)), self.max_tokens)
        room = self.max_length - longest
        if room < 1:
            raise UsageError(
                f"answers of {longest} tokens leave no room for a question in the context of {self.max_length}: "
                "open it with a longer one, or lower max_gen_toks"
            )
        stops = _stops(settings)
        sampled = settings.get("do_sample", settings.get(TEMPERATURE, 0) > 0)
        return Answer(
            asked=self.tok_encode(prompt)[-room:],
            key=luck(prompt, self.seed),
            max_tokens=longest,
            temperature=float(settings.get(TEMPERATURE, 1.0)) if sampled else 0.0,
            top_p=float(settings.get(TOP_P, 1.0)),
            stop=(lambda said: self._stopped(said, stops)) if stops else None,
        )

    def _stopped(self, said: Tokens, stops: Sequence[str]) -> bool:
        # The end alone is spelled for every token, the whole only when a stop is in it: a token is at least a byte.
        tail = self.tokenizer.decode(said[-(4 * max(map(len, stops)) + 4) :])
        return any(stop in tail for stop in stops) and self._cut(said, stops)[1]

    def _cut(self, said: Tokens, stops: Sequence[str]) -> tuple[str, bool]:
        """Return what was said after the thoughts and before the first stop, and whether there was one."""
        text = self.tokenizer.decode(said)
        if self.think_end is not None:
            thoughts, closed, content = text.partition(self.think_end)
            if not closed:
                return thoughts, False
            text = content.lstrip()
        places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
        return (text[: min(places)], True) if places else (text, False)


def _stops(settings: Mapping[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else cast(list[str], until)) if stop]
