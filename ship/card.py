"""The model card of a parcel: what it is, where it is from, what it may be used for, how it was made, what it cost, how to run it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from r1q.benchmarks.result import BenchResult
from r1q.core.errors import InputError
from r1q.core.untrusted import printable
from r1q.ship.chat_formats import R1
from r1q.ship.facts import Origin
from r1q.ship.figures import Figure
from r1q.ship.licences import Licence
from r1q.ship.recall import Recalled

_MOST_RESULTS = 1 << 28
_MIB = 1 << 20
_NOT_MEASURED = "not measured"
_GUESSED = "the model's own, which Ollama has to guess"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the card tells. `files` are (name, bytes, format); `made` is how the artifacts came about, `versions` of what made them.

    `format` is the chat format, None for an unknown one; `sampling` temperature and top-p, None where no file says them.
    """

    title: str
    origin: Origin
    licences: Sequence[Licence]
    recipe: str
    made: Recalled
    versions: Mapping[str, str]
    files: Sequence[tuple[str, int, str]]
    results: Sequence[BenchResult]
    figures: Sequence[Figure]
    target: str
    format: str | None
    sampling: tuple[float, float] | None
    context: int
    notes: Sequence[str]


def read_results(path: Path) -> list[BenchResult]:
    """Return the results of a file of `r1q bench --json`. Raises `InputError` for one that is not."""
    try:
        if path.stat().st_size > _MOST_RESULTS:
            raise InputError(f"{path} is larger than results can be")
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return [BenchResult.from_json(line) for line in lines]


def card_text(card: Card) -> str:
    """Return README.md."""
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True)}---\n\n# {card.title}\n",
        f"`{card.origin.base}`, quantized with r1q as `{card.recipe}`, packed for a {card.target}.\n",
        "\n".join(("| file | size | format |", "|--|--|--|", *(_file_row(*row) for row in card.files))) + "\n",
        _running(card),
        _licence_text(card),
        _results_text(card),
        _figures_text(card),
        _made_text(card),
        "## Check it\n\n`sha256sum -c SHA256SUMS`, or `r1q ship --check .`, which names the tensor in which one bit is another: "
        "`tensors.json` has the sha256 of every tensor, `r1q.lock.json` of every file.\n",
    ]
    if card.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in card.notes) + "\n")
    return "\n".join(part for part in parts if part)


def _front_matter(card: Card) -> dict[str, Any]:
    front: dict[str, Any] = {"base_model": card.origin.base, "base_model_relation": "quantized", "quantized_by": "r1q"}
    first = card.licences[0] if card.licences else None
    if first is None:
        front |= {"license": "unknown"}
    elif len(card.licences) == 1 and not first.notice:
        front |= {"license": first.id}
        if first.id == "other":
            front |= {"license_name": first.name, "license_link": first.link}
    else:
        strictest = next((licence for licence in card.licences if licence.notice), first)
        front |= {"license": strictest.id}
    return {**front, "pipeline_tag": "text-generation", "tags": ["r1q", *sorted({row[2] for row in card.files})]}


def _file_row(name: str, size: int, kind: str) -> str:
    return f"| `{name}` | {size / _MIB:.1f} MiB | {kind} |"


def _running(card: Card) -> str:
    folder = all(kind != "gguf" for _, _, kind in card.files)
    tools = "r1q: pip install 'r1q[onnx,serve]'" if folder else "Ollama, llama.cpp or r1q, whichever is installed"
    chat = "" if folder else f" (chat format: {card.format or _GUESSED})"
    return (
        f'## Run it\n\n```bash\n./run.sh "What is 17 + 25?"        # {tools}\n'
        "./run.sh --serve                   # an OpenAI-compatible server on 127.0.0.1\n```\n\n"
        f"On Windows: `./run.ps1`. {_settings(card)}The context is {card.context} tokens{chat}.\n"
    )


def _settings(card: Card) -> str:
    if card.sampling is None:
        return ""
    temperature, top_p = card.sampling
    said = f"temperature {temperature:g}, top-p {top_p:g}"
    if card.format == R1:
        return (
            f"Settings are those DeepSeek advises for R1: {said}, no system prompt, the answer begun with `<think>`. "
        )
    return f"Settings: {said}. "


def _licence_text(card: Card) -> str:
    if not card.licences:
        return (
            "## Licence\n\n**Unknown.** The source had no model card that says it. Find out what "
            f"`{card.origin.base}` may be used for before you pass this on.\n"
        )
    lines = ["## Licence\n"]
    for licence in card.licences:
        name = licence.name or licence.id
        lines.append(f"**{f'[{name}]({licence.link})' if licence.link else name}**\n")
        lines += [f"- {duty}" for duty in licence.duties]
        lines.append("")
    if card.origin.texts:
        lines.append(
            "The source's own texts are in this folder: " + ", ".join(f"`{p.name}`" for p in card.origin.texts) + ".\n"
        )
    return "\n".join(lines)


def _results_text(card: Card) -> str:
    """Return the table; a column that nothing was measured for is left out."""
    if not card.results:
        return ""
    rows = [_result_cells(result) for result in card.results]
    shown = [name for name in rows[0] if any(row[name] != _NOT_MEASURED for row in rows)]
    lines = ["| " + " | ".join(shown) + " |", "|--" * len(shown) + "|"]
    lines += ["| " + " | ".join(row[name] for name in shown) + " |" for row in rows]
    machines = list(dict.fromkeys(printable(result.emulated or result.machine.cpu) for result in card.results))
    commands = list(dict.fromkeys(printable(shlex.join(result.command)) for result in card.results))
    text = "\n".join(lines)
    run = "\n".join(commands)
    about = f"Speeds are means ± sample deviation, scores ± standard error; measured on {', '.join(machines)} by"
    return f"## What it costs\n\n{text}\n\n{about}\n\n```\n{run}\n```\n"


def _figures_text(card: Card) -> str:
    parts = []
    for figure in card.figures:
        heading = _inline(figure.heading)
        parts.append(f"![{heading}]({figure.file})\n")
        if figure.caption:
            parts.append(f"{heading}: {_inline(figure.caption)}.\n")
    return "\n".join(parts)


def _made_text(card: Card) -> str:
    recipe = " `recipe.toml` is in this folder." if card.made.recipe else ""
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    inputs = "".join(f"- `{name}`, sha256 `{digest}`\n" for name, digest in card.made.inputs)
    read = f"\nIt reads, besides the model:\n\n{inputs}" if inputs else ""
    return (
        f"## How it was made\n\n```bash\n{card.made.command}\n```\n\nWith {versions}.{recipe} "
        f"Sums of the source's files and every fallback are in `r1q.lock.json`.\n{read}"
    )


def _result_cells(result: BenchResult) -> dict[str, str]:
    found = result.summary()
    memory = found.get("peak_memory")
    return {
        "artifact": f"`{printable(result.name)}`",
        "size": f"{result.bytes / _MIB:.1f} MiB",
        "bits/weight": f"{result.bits_per_weight:.2f}",
        "runtime": printable(result.runtime),
        "threads": str(result.threads),
        "prefill, tokens/s": _estimate(found.get("prefill_tokens_per_second"), "{:.0f}"),
        "decode, tokens/s": _estimate(found.get("decode_tokens_per_second"), "{:.1f}"),
        "first token": _estimate(found.get("first_token_seconds"), "{:.0f} ms", 1000),
        "peak RSS": f"{memory / _MIB:.0f} MiB" if memory else _NOT_MEASURED,
        "perplexity": _estimate(found.get("perplexity"), "{:.3f}"),
        "KLD": _estimate(found.get("mean_kld"), "{:.2g}"),
        "top-1": _estimate(found.get("top1_agreement"), "{:.1f} %", 100),
    }


def _inline(text: str) -> str:
    """Return text for a line of Markdown: what would begin markup there is escaped."""
    return re.sub(r"([\\`*_\[\]<>#|!])", r"\\\1", text)


def _estimate(value: Any, form: str, factor: float = 1) -> str:
    number = value.get("value") if isinstance(value, dict) else value
    error = value.get("error") if isinstance(value, dict) else None
    if number is None:
        return _NOT_MEASURED
    shown = form.format(number * factor)
    if not error:
        return shown
    amount, unit = (shown.split(" ")[0], shown[len(shown.split(" ")[0]) :])
    return f"{amount} ± {form.format(error * factor).split(' ')[0]}{unit}"
