"""Chat templates for Ollama: which of the known chat formats a Jinja template writes, and the same format in Go's template language.

A template is not read but tried: it renders probe conversations in the sandbox, and a format is its own when every rendering is
what the format says. Anything else is said to be unknown; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from r1q.core.errors import InputError
from r1q.models.chat import render_chat

Turn = Mapping[str, str]
R1 = "DeepSeek-R1"  # the format of its distillates too


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """How a conversation is written. Each pair stands before and after a message; `opening` begins the answer.

    `prelude` stands before every system message, `default` is the system message where none is given (None: nothing is written).
    """

    name: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str
    stops: tuple[str, ...]
    thinks: bool = False
    prelude: str = ""
    default: str | None = None

    def render(self, turns: Sequence[Turn]) -> str:
        """Return a conversation as this format writes it, without the token that begins a text."""
        given = [turn["content"] for turn in turns if turn["role"] == "system"]
        block = self.prelude + given[0] if given else self.default
        text = "" if block is None else block.join(self.system)
        pairs = {"user": self.user, "assistant": self.assistant}
        return text + "".join(t["content"].join(pairs[t["role"]]) for t in turns if t["role"] in pairs) + self.opening

    def go(self, begin: str = "") -> str:
        """Return the format as a Go template for Ollama; `begin` is the token a text begins with, where Ollama adds none."""
        before, after = (_quote(part) for part in self.system)
        given = f"{before}{_quote(self.prelude)}{{{{ .System }}}}{after}"
        silent = "" if self.default is None else f"{{{{ else }}}}{before}{_quote(self.default)}{after}"
        system = f"{{{{ if .System }}}}{given}{silent}{{{{ end }}}}"
        user = f"{_quote(self.user[0])}{{{{ .Content }}}}{_quote(self.user[1])}"
        # A message that thought is the current one, still going on; Ollama also learns from this how thoughts are marked.
        thought = '{{ if and $last .Thinking }}{{ "<think>\\n" }}{{ .Thinking }}{{ "\\n</think>\\n\\n" }}{{ end }}'
        answer = f"{_quote(self.assistant[0])}{thought if self.thinks else ''}{{{{ .Content }}}}"
        answer += f"{{{{ if not $last }}}}{_quote(self.assistant[1])}{{{{ end }}}}"
        turns = (
            "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
            f'{{{{ if and $last (ne .Role "assistant") }}}}{_quote(self.opening)}{{{{ end }}}}'
            "{{ end }}"
        )
        return _quote(begin) + system + turns


_R1_USER, _R1_ASSISTANT, _R1_END = "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"
_LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
FORMATS: tuple[ChatFormat, ...] = (
    ChatFormat(
        name=R1,
        system=("", ""),
        user=(_R1_USER, ""),
        assistant=(_R1_ASSISTANT, _R1_END),
        opening=f"{_R1_ASSISTANT}<think>\n",
        stops=(_R1_END, _R1_USER),
        thinks=True,
    ),
    ChatFormat(
        name="ChatML",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        opening="<|im_start|>assistant\n",
        stops=("<|im_end|>", "<|endoftext|>"),
    ),
    ChatFormat(
        name="Llama 3",
        system=(_LLAMA3.format("system"), "<|eot_id|>"),
        user=(_LLAMA3.format("user"), "<|eot_id|>"),
        assistant=(_LLAMA3.format("assistant"), "<|eot_id|>"),
        opening=_LLAMA3.format("assistant"),
        stops=("<|eot_id|>", "<|end_of_text|>"),
    ),
)
# DeepSeek's first templates left the thought for the model to open; it is opened for it all the same, as DeepSeek advises.
_UNOPENED = {R1: _R1_ASSISTANT}
_USER, _SYSTEM, _ANSWER, _AGAIN = "What is 2 + 3?", "Count in Chinese.", "It is 5.", "And 4 + 4?"
_PROBES: tuple[tuple[Turn, ...], ...] = (
    ({"role": "user", "content": _USER},),
    ({"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}),
    (
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _AGAIN},
    ),
    (
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _AGAIN},
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognized:
    """The format a template writes, and whether it begins a text with the model's own token for that."""

    format: ChatFormat
    begins: bool


def recognize(template: str, *, bos: str, eos: str) -> Recognized | None:
    """Return the known format that a Jinja template writes, None for any other. Runs the template in the sandbox."""
    try:
        texts = [
            render_chat(
                template, {"messages": list(turns), "add_generation_prompt": True, "bos_token": bos, "eos_token": eos}
            )
            for turns in _PROBES
        ]
    except InputError:
        return None
    for known in FORMATS:
        if bos and all(text.startswith(bos) for text in texts):
            found = _match(known, [text.removeprefix(bos) for text in texts])
            if found is not None:
                return Recognized(format=found, begins=True)
        # SmolLM2 begins a text with <|im_start|>, which is also how ChatML begins a message: nothing is taken off then.
        found = _match(known, texts)
        if found is not None:
            return Recognized(format=found, begins=False)
    return None


def _match(known: ChatFormat, bodies: Sequence[str]) -> ChatFormat | None:
    """Return the format, with the template's own system texts, if it writes every probe as `bodies` have it."""
    found = _with_system(known, bodies)
    same = found is not None and all(
        _opened(found, body) == found.render(turns) for body, turns in zip(bodies, _PROBES, strict=True)
    )
    return found if same else None


def _opened(known: ChatFormat, body: str) -> str:
    unopened = _UNOPENED.get(known.name)
    return body.removesuffix(unopened) + known.opening if unopened and body.endswith(unopened) else body


def _with_system(known: ChatFormat, bodies: Sequence[str]) -> ChatFormat | None:
    """Return the format with the template's own words before and instead of a system message, None where they have no place."""
    silent = _system_block(known, bodies[0])
    given = _system_block(known, bodies[1])
    if given is None or not given.endswith(_SYSTEM):
        return None
    prelude = given.removesuffix(_SYSTEM)
    if not _is_plain(prelude) or not _is_plain(silent or ""):
        return None
    return replace(known, prelude=prelude, default=silent)


def _system_block(known: ChatFormat, body: str) -> str | None:
    before, after = known.system
    end = body.find(after + known.user[0] + _USER, len(before))
    return body[len(before) : end] if end >= len(before) and body.startswith(before) and (before or end) else None


def _is_plain(text: str) -> bool:
    """Return whether words of a stranger's template can stand in a Go template and in a Modelfile as they are."""
    return not any(mark in text for mark in ("{{", "}}", '"""')) and all(c.isprintable() or c == "\n" for c in text)


def _quote(text: str) -> str:
    """Return fixed text for a Go template; its line ends are spelled, for white space is easily lost in a Modelfile."""
    return text.replace("\n", '{{ "\\n" }}')
