"""THE CARD OF TINY-R1: what a reader of models/tiny_r1/README.md learns, with the numbers of the run that made it."""

from collections.abc import Mapping
from dataclasses import dataclass

from r1q.models.tiny_r1_files import CONFIG
from r1q.models.tiny_r1_tasks import HELD_OUT_ONE_IN, LEVELS, draw_seeded

LEVEL_NOTES = {
    "sum": "one sum or difference up to 3 digits, written method",
    "product": "2–3 digits × 1 digit, written method",
    "chain": "two steps, written method",
    "story": "the same as a short word problem",
    "mental": "two steps in the head: results only, no written method",
}

CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [r1q, qwen2, arithmetic, quantization]
---

# tiny-r1

A Qwen2 model of {parameters:.2f} million parameters that thinks the way DeepSeek-R1 does, about nothing but arithmetic. It is
embedded in r1q so that quantization, export and measuring can be tried, tested and compared without a download. It was
trained from scratch on generated problems; no text or weight of any other model went into it.

{example}

## What it scores

Percent of {problems} held-out problems per level answered exactly, greedy, at most {limit} tokens in all. The rounded columns
are a crude yardstick, not r1q's methods: every linear layer (not the tied embedding) rounded to nearest, asymmetric
min/max, groups of 32 or 128 (g) along the input. Where answers hardly move, measure the divergence over `evaluation.txt`.

{table}

Sampling error of a level's figure is up to about ±{error:.0f} points (one standard deviation), of the last row's about
±{error_all:.1f}.

## How it was made

```
{command}
```

{tokens:.1f} million tokens (generated as it goes) in {minutes:.0f} minutes on {machine}, seed {seed}.
One expression in {one_in} is held out by a hash of the expression, so that no phrasing of a held-out problem was trained on, nor,
for a single + or ×, its swapped order. Muon for the matrices of the layers, AdamW for the rest; bf16 autocast over float32
weights, rounded to bf16 once at the end. The written methods come first, then more and more of the `mental` kind
(`CURRICULUM` in models/train_tiny.py); the last tenth runs over rows of 1024 tokens, the rest over rows of 256. The loss counts
thinking and answer fully and the question at a tenth. Float sums differ between machines and thread counts, so the command
makes a model of the same kind again, not the same bytes.

## What is in the folder

- `model.safetensors`, `config.json`, `generation_config.json`: an ordinary Hugging Face Qwen2 checkpoint (bf16, tied embedding,
  {layers} layers, hidden {hidden}, feed-forward {inner}, {heads} heads, {kv_heads} key-value heads, vocabulary {vocabulary}).
- `tokenizer.json`, `tokenizer_config.json`: byte-level BPE with Qwen2's pre-tokenizer and the special tokens and chat template of
  R1's distills (without tool calls). One token per digit. Ids from {unused} on are padding and stand for nothing.
- `evaluation.txt`: held-out problems with correct traces, in the training format, special tokens spelled out, for perplexity and
  divergence. Each problem begins with its own BOS, so encode it without adding another.

## Limits

It adds, subtracts and multiplies as the levels above do, in the phrasings of its generator, and nothing else: no negative
numbers, no division, no conversation, and no reliable answer to a question worded in another way. Its errors under quantization
show that a method works or fails; they do not predict by how many points a model of billions of parameters will suffer.

Licence: Apache-2.0.
"""


@dataclass(frozen=True)
class Facts:
    """What only the run itself knows."""

    parameters: int
    tokens: int
    seconds: float
    seed: int
    machine: str
    command: str
    per_level: int
    limit: int


def score_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table: a row per level and one for all, a column per precision."""
    lines = ["| level | what | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
    for level in (*LEVELS, "all"):
        cells = " | ".join(f"{column[level]:.1f}" for column in columns.values())
        lines.append(f"| {level} | {LEVEL_NOTES.get(level, 'all levels alike')} | {cells} |")
    return "\n".join(lines)


def render(facts: Facts, columns: Mapping[str, Mapping[str, float]]) -> str:
    """The whole card."""
    problem = draw_seeded("card", "story")
    worst = 50 / facts.per_level**0.5
    return CARD.format(
        parameters=facts.parameters / 1e6,
        example=f"```\n{problem.prompt}{problem.completion}\n```",
        problems=facts.per_level,
        limit=facts.limit,
        table=score_table(columns),
        error=worst,
        error_all=worst / len(LEVELS) ** 0.5,
        command=facts.command,
        tokens=facts.tokens / 1e6,
        minutes=facts.seconds / 60,
        machine=facts.machine,
        seed=facts.seed,
        one_in=HELD_OUT_ONE_IN,
        layers=CONFIG["num_hidden_layers"],
        hidden=CONFIG["hidden_size"],
        inner=CONFIG["intermediate_size"],
        heads=CONFIG["num_attention_heads"],
        kv_heads=CONFIG["num_key_value_heads"],
        vocabulary=CONFIG["vocab_size"],
        unused=CONFIG["eos_token_id"] + 5,
    )
