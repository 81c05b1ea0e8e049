"""r1q distill: a smaller model that thinks as its teacher does, as far as the text it sees allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("teacher", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The student's folder.")
@click.option("--to", "ratio", metavar="SHARE", help="Share of the teacher's weights, such as 0.5x: widths are chosen.")
@click.option("--hidden", type=int, metavar="N", help="Channels between blocks.")
@click.option("--ffn", type=int, metavar="N", help="Channels inside the feed-forward layers.")
@click.option("--kv-heads", type=int, metavar="N", help="Key-value heads, each with the query heads that read it.")
@click.option("--layers", type=int, metavar="N", help="Blocks: dropping some costs reasoning most.")
@click.option(
    "--student", metavar="MODEL", help="A ready model with the teacher's tokenizer to train instead of pruning."
)
@click.option("--steps", type=click.IntRange(min=0), default=1000, show_default=True, help="Steps; 0 only prunes.")
@click.option("--rows", type=click.IntRange(min=1), default=8, show_default=True, help="Windows of text a step.")
@click.option(
    "--lr", type=click.FloatRange(min=0, min_open=True), help="Learning rate.  [default: 1e-4; embedded: 4e-4]"
)
@click.option("--every", type=click.IntRange(min=1), default=50, show_default=True, help="Steps between measurements.")
@click.option(
    "--patience", type=click.IntRange(min=1), default=10, show_default=True, help="Measurements without gain."
)
@click.option(
    "--text", metavar="SPEC", help="Text, as --calibration of r1q quantize; problems: the embedded model's own."
)
@click.option(
    "--samples", type=click.IntRange(min=2), default=2048, show_default=True, help="Windows of text to draw from."
)
@click.option("--seq-len", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens of a window.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of the text.")
@click.option(
    "--top",
    type=click.IntRange(min=0),
    metavar="N",
    help="Learn from the teacher's N likeliest tokens and the rest as one, kept on the disk for the next pass over the text; 0: from "
    "all, made anew each time.  [default: 64 where text is passed over more than once, else 0]",
)
@click.option("--cache", default="4GiB", metavar="SIZE", show_default=True, help="Most that --top keeps on the disk.")
@click.option("--dry-run", is_flag=True, help="Say what would be made and what it would need, and stop.")
@click.option("-q", "--quiet", is_flag=True, help="No progress; only errors and the folder's path.")
def distill(
    teacher: str | None,
    ratio: str | None,
    hidden: int | None,
    ffn: int | None,
    kv_heads: int | None,
    layers: int | None,
    student: str | None,
    steps: int,
    rows: int,
    lr: float | None,
    every: int,
    patience: int,
    **options: Any,
) -> None:
    """Make a smaller model of TEACHER: prune its widths, then train it on the teacher's own predictions.

    TEACHER is a dense checkpoint (folder or hub id); without it the embedded model is taken. The student is an ordinary Hugging Face
    folder for r1q quantize and r1q bench. The command can be killed at any moment: run it again and it goes on. It trains on the CPU,
    in one process or, started by torchrun, in several, each of which takes its share of every batch.

    \b
    Examples:
      r1q distill --to 0.5x -o student
      r1q distill ./DeepSeek-R1-Distill-Qwen-1.5B --ffn 6144 -o student --text traces.jsonl:0.7,builtin:0.3
      r1q distill --to 0.5x --steps 0 -o pruned
      torchrun --nproc-per-node 2 -m r1q distill --to 0.5x -o student
    """
    from r1q.commands.distilling import Asked, asked_sizes, run_distillation
    from r1q.core.allocator import return_freed_memory
    from r1q.distill.group import joined
    from r1q.distill.train import Plan
    from r1q.models.embedded import open_model

    return_freed_memory()
    source = open_model(teacher, progress=not options["quiet"]).source
    widths = {"hidden": hidden, "ffn": ffn, "kv_heads": kv_heads, "layers": layers}
    if student is not None and (ratio is not None or any(widths.values())):
        raise click.UsageError("--student is a model as it is: leave --to and sizes out")
    ready = None if student is None else open_model(student, progress=not options["quiet"]).source
    wanted = ready or asked_sizes(source.config, ratio, **widths)
    plan = Plan(steps=steps, rows=rows, lr=lr or (1e-4 if teacher else 4e-4), every=every, patience=patience)
    with joined(rows) as group:
        folder = run_distillation(source, Asked(wanted=wanted, plan=plan, embedded=teacher is None, **options), group)
    if options["quiet"] and folder is not None and group.is_first:
        click.echo(str(folder))
