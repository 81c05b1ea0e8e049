"""The model card of a parcel: what it is, where it is from, what it may be used for, how it was made, what it cost, how to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from r1q.benchmarks.result import BenchResult
from r1q.core.errors import InputError
from r1q.ship.facts import Origin
from r1q.ship.licences import Licence

_MOST_RESULTS = 1 << 28
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the card tells. `files` are (name, bytes, format); `command` made the parcel's artifacts."""

    title: str
    origin: Origin
    licences: Sequence[Licence]
    recipe: str
    command: str
    files: Sequence[tuple[str, int, str]]
    results: Sequence[BenchResult]
    target: str
    format: str | None
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
        f"## How it was made\n\n```\n{card.command}\n```\n\nVersions, seeds and sums of every input are in `r1q.lock.json`.\n",
        "## Check it\n\n`sha256sum -c SHA256SUMS`, or `r1q ship --check .`, which names the tensor in which one bit is another.\n",
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
    chat = card.format or "the model's own, which Ollama has to guess"
    return (
        '## Run it\n\n```bash\n./run.sh "What is 17 + 25?"        # Ollama, llama.cpp or r1q, whichever is installed\n'
        "./run.sh --serve                   # an OpenAI-compatible server on 127.0.0.1\n```\n\n"
        "On Windows: `./run.ps1`. Settings are DeepSeek's for R1: temperature 0.6, top-p 0.95, no system prompt, "
        f"the answer begun with `<think>`. The context is {card.context} tokens (chat format: {chat}).\n"
    )


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
    if not card.results:
        return ""
    head = (
        "| artifact | size | bits/weight | runtime | prefill, tokens/s | decode, tokens/s | first token | peak RSS | "
    )
    head += "perplexity | KLD | top-1 |"
    rows = [head, "|--" * 11 + "|", *(_result_row(result) for result in card.results)]
    machine = card.results[0].machine
    about = getattr(machine, "cpu", "") or "the machine in the results"
    command = " ".join(card.results[0].command)
    return f"## What it costs\n\n{chr(10).join(rows)}\n\nMeasured on {about} by `{command}`; mean ± sample deviation.\n"


def _result_row(result: BenchResult) -> str:
    found = result.summary()
    cells = [
        f"`{result.name}`",
        f"{result.bytes / _MIB:.1f} MiB",
        f"{result.bits_per_weight:.2f}",
        result.runtime,
        _estimate(found.get("prefill_tokens_per_second"), "{:.0f}"),
        _estimate(found.get("decode_tokens_per_second"), "{:.1f}"),
        _estimate(found.get("first_token_seconds"), "{:.0f} ms", 1000),
        f"{found['peak_memory'] / _MIB:.0f} MiB" if found.get("peak_memory") else "not measured",
        _estimate(found.get("perplexity"), "{:.3f}"),
        _estimate(found.get("mean_kld"), "{:.2g}"),
        _estimate(found.get("top1_agreement"), "{:.1f} %", 100),
    ]
    return "| " + " | ".join(cells) + " |"


def _estimate(value: Any, form: str, factor: float = 1) -> str:
    number = value.get("value") if isinstance(value, dict) else value
    error = value.get("error") if isinstance(value, dict) else None
    if number is None:
        return "not measured"
    shown = form.format(number * factor)
    if not error:
        return shown
    amount, unit = (shown.split(" ")[0], shown[len(shown.split(" ")[0]) :])
    return f"{amount} ± {form.format(error * factor).split(' ')[0]}{unit}"
