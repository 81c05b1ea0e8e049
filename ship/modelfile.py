"""Ollama's Modelfile for a GGUF file: where the weights are, R1's sampling, a context that thoughts fit in, and the chat template."""

from __future__ import annotations

from dataclasses import dataclass

from r1q.ship.chat_formats import recognize
from r1q.ship.facts import ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Modelfile:
    """The file's text, the name of the chat format (None: unknown, left to Ollama), and what the user should know."""

    text: str
    format: str | None
    notes: tuple[str, ...] = ()


def make_modelfile(facts: ModelFacts, file: str, *, context: int) -> Modelfile:
    """Return the Modelfile for `file`, a GGUF beside it, with a context of `context` tokens."""
    notes: list[str] = []
    lines = [
        f"FROM ./{file}",
        f"PARAMETER temperature {facts.temperature:g}",
        f"PARAMETER top_p {facts.top_p:g}",
        # Without it Ollama takes 2048 or 4096 tokens, which a long thought overflows.
        f"PARAMETER num_ctx {context}",
    ]
    found = recognize(facts.template, bos=facts.bos, eos=facts.eos) if facts.template else None
    if found is None:
        notes.append(
            "the chat template is none of DeepSeek-R1's, ChatML and Llama 3: the Modelfile has no TEMPLATE, and Ollama takes the "
            "one it guesses; compare its answers with `r1q serve`, which renders the model's own"
        )
    else:
        begin = facts.bos if found.begins and not facts.adds_bos else ""
        lines += [f'PARAMETER stop "{stop}"' for stop in found.format.stops]
        lines.append(f'TEMPLATE """{found.format.go(begin)}"""')
    return Modelfile(text="\n".join(lines) + "\n", format=found.format.name if found else None, notes=tuple(notes))
