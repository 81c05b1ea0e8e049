"""What r1q distill is asked and what it says: sizes, what a real run would need, where this one is, what it reached."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from r1q.core.errors import ResourceError, UsageError
from r1q.distill.sizes import DEPTH_WARNING, Sizes, check_sizes, choose_sizes, parse_ratio, sizes_of
from r1q.distill.student import Outcome, tokens_needed
from r1q.distill.train import Plan, Progress
from r1q.models.config import ModelConfig
from r1q.plan.memory import ceiling


def asked_sizes(
    config: ModelConfig,
    ratio: str | None,
    *,
    hidden: int | None,
    ffn: int | None,
    kv_heads: int | None,
    layers: int | None,
) -> Sizes:
    """Return the student's sizes, checked. Raises `UsageError` where none, or both ways, are given; `InputError` as `check_sizes`."""
    whole = sizes_of(config)
    given = [size for size in (hidden, ffn, kv_heads, layers) if size is not None]
    if (ratio is None) == (not given):
        raise UsageError("say how small: either --to 0.5x, or some of --hidden, --ffn, --kv-heads and --layers")
    if ratio is not None:
        return choose_sizes(config, parse_ratio(ratio))
    sizes = Sizes(
        hidden=whole.hidden if hidden is None else hidden,
        ffn=whole.ffn if ffn is None else ffn,
        kv_heads=whole.kv_heads if kv_heads is None else kv_heads,
        layers=whole.layers if layers is None else layers,
    )
    check_sizes(config, sizes)
    return sizes


def refuse_large(need: int) -> None:
    """Raise `ResourceError` where a run needs more bytes than there are."""
    free = ceiling(None)
    if need > free:
        raise ResourceError(
            f"training needs about {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: both models are in memory whole; "
            "take a smaller model, or fewer --rows"
        )


def announce(console: Console, config: ModelConfig, sizes: Sizes, plan: Plan, length: int) -> None:
    """Say before the run what the student will be, what it sees, and what a model of use would have to see."""
    whole = sizes_of(config)
    before, after = whole.parameters(config), sizes.parameters(config)
    cuts, fewest, most = tokens_needed(before, after)
    real_cuts, real_fewest, real_most = tokens_needed(7e9, 1.5e9)
    lines = [
        f"{config.name}: {before / 1e6:,.2f} M weights to {after / 1e6:,.2f} M ({after / before:.2f}x): hidden {whole.hidden} to "
        f"{sizes.hidden}, feed-forward {whole.ffn} to {sizes.ffn}, kv heads {whole.kv_heads} to {sizes.kv_heads}, "
        f"layers {whole.layers} to {sizes.layers}",
        f"this run sees {plan.steps * plan.rows * length / 1e6:,.2f} million tokens; loss: divergence from the teacher's whole "
        "next-token distribution, computed as it goes",
        f"a real 7B to 1.5B is {real_cuts} cuts of a third, each with 80 to 100 billion tokens (Minitron): {real_fewest / 1e9:.0f} to "
        f"{real_most / 1e9:.0f} billion; this cut, by that measure, {fewest / 1e9:.0f} to {most / 1e9:.0f} ({cuts}). "
        "Call the result a reasoning model when a benchmark of tasks does",
    ]
    if sizes.layers < whole.layers:
        lines.append(f"warning: {DEPTH_WARNING}")
    for line in lines:
        console.print(line, highlight=False)


def show_student(console: Console, steps: Iterator[Progress | Outcome], plan: Plan) -> Path:
    """Say where the run is at every measurement, and at the end what was reached; return the student's folder."""
    for step in steps:
        if isinstance(step, Outcome):
            _show_outcome(console, step, plan)
            return step.folder
        loss = f"loss {step.loss:.4f}, " if step.step else ""
        console.print(
            f"step {step.step} of {plan.steps}: {loss}held out {step.held_out:.4f} nats a token, {step.seconds:.0f} s",
            highlight=False,
        )
    raise AssertionError("a run ends with its outcome")


def _show_outcome(console: Console, made: Outcome, plan: Plan) -> None:
    now = made.reached
    if now is None:
        reached = "pruned, not trained"
    else:
        why = "; stopped: it no longer improved" if now.step < plan.steps else ""
        reached = f"held out {now.first:.4f} to {now.best:.4f} nats a token at step {now.best_step}, in {now.seconds:.0f} s{why}"
    console.print(f"done: {made.folder} ({made.parameters / made.teacher_parameters:.2f}x): {reached}", highlight=False)
    console.print(f"next: r1q quantize {made.folder} --bits 4", highlight=False)
