"""What r1q distill is asked and what it says: sizes, what a real run would need, where this one is, what it reached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from r1q.core.errors import ResourceError, UsageError
from r1q.distill.group import Group
from r1q.distill.network import memory_need
from r1q.distill.ready import weights_of
from r1q.distill.sizes import DEPTH_WARNING, Sizes, check_sizes, choose_sizes, parse_ratio, sizes_of
from r1q.distill.student import Keep, Outcome, make_student, require_student, student_weights, tokens_needed
from r1q.distill.text import PROBLEMS, open_text
from r1q.distill.train import Plan, Progress
from r1q.models.config import ModelConfig
from r1q.models.source import ModelSource
from r1q.models.tokenizer import Tokenizer
from r1q.plan.memory import ceiling, parse_size
from r1q.plan.render import make_console

_TOP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What `r1q distill` is asked: `wanted`: sizes, or a ready student; `embedded`: the teacher is the embedded model."""

    wanted: Sizes | ModelSource
    plan: Plan
    embedded: bool
    output: Path
    text: str | None
    samples: int
    seq_len: int
    seed: int
    top: int | None
    cache: str
    dry_run: bool
    quiet: bool

    @property
    def spec(self) -> str:
        """The text, as `open_text` takes it."""
        return self.text or (PROBLEMS if self.embedded else "builtin")

    @property
    def top_of_run(self) -> int:
        """How many tokens are learned from, 0 for all: keeping what the teacher said helps where the same windows come again."""
        if self.top is not None:
            return self.top
        return _TOP if self.spec != PROBLEMS and self.plan.steps * self.plan.rows > self.samples else 0


def run_distillation(source: ModelSource, asked: Asked, group: Group) -> Path | None:
    """Make the student and say how it goes, in the first process of `group` alone; return its folder, None for a dry run."""
    console = make_console(asked.quiet or not group.is_first)
    plan, limit = asked.plan, parse_size(asked.cache)
    top = asked.top_of_run
    require_student(source, asked.wanted)
    before, after = weights_of(source), student_weights(source, asked.wanted)
    announce(console, source, asked.wanted, plan, asked.seq_len, top)
    if plan.steps:
        share = -(-plan.rows // group.size) * asked.seq_len
        refuse_large(group.local * memory_need(before, after, source.config, share))
    if asked.dry_run:
        return None
    tokenizer = Tokenizer.open(source.path)
    text = open_text(asked.spec, tokenizer, samples=asked.samples, length=asked.seq_len, seed=asked.seed)
    steps = make_student(source, asked.wanted, text, plan, asked.output, keep=Keep(top=top, limit=limit), group=group)
    return show_student(console, steps, plan)


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


def announce(
    console: Console, source: ModelSource, wanted: Sizes | ModelSource, plan: Plan, length: int, top: int
) -> None:
    """Say before the run what the student will be, what it sees, and what a model of use would have to see."""
    before, after = weights_of(source), student_weights(source, wanted)
    whole, sizes = sizes_of(source.config), wanted if isinstance(wanted, Sizes) else sizes_of(wanted.config)
    name = source.config.name if isinstance(wanted, Sizes) else f"{source.config.name} to {wanted.config.name}"
    cuts, fewest, most = tokens_needed(before, after)
    real_cuts, real_fewest, real_most = tokens_needed(7e9, 1.5e9)
    lines = [
        f"{name}: {before / 1e6:,.2f} M weights to {after / 1e6:,.2f} M ({after / before:.2f}x): hidden {whole.hidden} to "
        f"{sizes.hidden}, feed-forward {whole.ffn} to {sizes.ffn}, kv heads {whole.kv_heads} to {sizes.kv_heads}, "
        f"layers {whole.layers} to {sizes.layers}",
        f"this run sees {plan.steps * plan.rows * length / 1e6:,.2f} million tokens; loss: divergence from the teacher's "
        + (
            f"{top} likeliest next tokens and the rest as one, kept on the disk"
            if top
            else "whole next-token distribution"
        ),
        f"a real 7B to 1.5B is {real_cuts} cuts of a third, each with 80 to 100 billion tokens (Minitron): {real_fewest / 1e9:.0f} to "
        f"{real_most / 1e9:.0f} billion; this cut, by that measure, {fewest / 1e9:.0f} to {most / 1e9:.0f} ({cuts}). "
        "Call the result a reasoning model when a benchmark of tasks does",
    ]
    if sizes.layers < whole.layers:
        lines.append(f"warning: {DEPTH_WARNING}")
    for line in lines:
        console.print(line, highlight=False)


def show_student(console: Console, steps: Iterator[Progress | Outcome], plan: Plan) -> Path:
    """Say where the run is at every measurement, and at the end what was reached; return the student's folder.

    Where it is interrupted, say from which step it will go on.
    """
    folder, kept = None, 0
    try:
        for step in steps:
            if isinstance(step, Outcome):
                _show_outcome(console, step, plan)
                folder = step.folder
                continue
            kept = step.step
            loss = f"loss {step.loss:.4f}, " if step.step else ""
            console.print(
                f"step {step.step} of {plan.steps}: {loss}held out {step.held_out:.4f} nats a token, {step.seconds:.0f} s",
                highlight=False,
            )
    except KeyboardInterrupt:
        console.print(f"stopped: {kept} of {plan.steps} steps are kept", highlight=False)
        raise
    assert folder is not None, "a run ends with its outcome"
    return folder


def _show_outcome(console: Console, made: Outcome, plan: Plan) -> None:
    now = made.reached
    if now is None:
        reached = "pruned, not trained"
    else:
        why = "; stopped: it no longer improved" if now.step < plan.steps else ""
        reached = f"held out {now.first:.4f} to {now.best:.4f} nats a token at step {now.best_step}, in {now.seconds:.0f} s{why}"
    console.print(f"done: {made.folder} ({made.parameters / made.teacher_parameters:.2f}x): {reached}", highlight=False)
    console.print(f"next: r1q quantize {made.folder} --bits 4", highlight=False)
