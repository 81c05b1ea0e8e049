"""r1q distill: a smaller model that thinks as its teacher does, as far as the text it sees allows."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("teacher", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The student's folder.")
@click.option("--to", "ratio", metavar="SHARE", help="Share of the teacher's weights, such as 0.5x: widths are chosen.")
@click.option("--hidden", type=int, metavar="N", help="Channels between blocks.")
@click.option("--ffn", type=int, metavar="N", help="Channels inside the feed-forward layers.")
@click.option("--kv-heads", type=int, metavar="N", help="Key-value heads, each with the query heads that read it.")
@click.option("--layers", type=int, metavar="N", help="Blocks: dropping some costs reasoning most.")
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
@click.option("-q", "--quiet", is_flag=True, help="No progress; only errors and the folder's path.")
def distill(
    teacher: str | None,
    output: Path,
    ratio: str | None,
    hidden: int | None,
    ffn: int | None,
    kv_heads: int | None,
    layers: int | None,
    steps: int,
    rows: int,
    lr: float | None,
    every: int,
    patience: int,
    text: str | None,
    samples: int,
    seq_len: int,
    seed: int,
    quiet: bool,
) -> None:
    """Make a smaller model of TEACHER: prune its widths, then train it on the teacher's own predictions.

    TEACHER is a dense checkpoint (folder or hub id); without it the embedded model is taken. The student is an ordinary Hugging Face
    folder for r1q quantize and r1q bench. The command can be killed at any moment: run it again and it goes on. It trains in one
    process, on the CPU.

    \b
    Examples:
      r1q distill --to 0.5x -o student
      r1q distill ./DeepSeek-R1-Distill-Qwen-1.5B --ffn 6144 -o student --text traces.jsonl:0.7,builtin:0.3
    """
    from r1q.commands.distilling import announce, asked_sizes, refuse_large, show_student
    from r1q.distill.network import memory_need
    from r1q.distill.sizes import sizes_of
    from r1q.distill.student import make_student
    from r1q.distill.text import PROBLEMS, open_text
    from r1q.distill.train import Plan
    from r1q.models.embedded import open_model
    from r1q.models.tokenizer import Tokenizer
    from r1q.plan.memory import return_freed_memory
    from r1q.plan.render import make_console

    return_freed_memory()
    console = make_console(quiet)
    source = open_model(teacher, progress=not quiet).source
    sizes = asked_sizes(source.config, ratio, hidden=hidden, ffn=ffn, kv_heads=kv_heads, layers=layers)
    plan = Plan(steps=steps, rows=rows, lr=lr or (1e-4 if teacher else 4e-4), every=every, patience=patience)
    announce(console, source.config, sizes, plan, seq_len)
    if steps:
        before, after = (size.parameters(source.config) for size in (sizes_of(source.config), sizes))
        refuse_large(memory_need(before, after, source.config, rows * seq_len))
    spec = text or ("builtin" if teacher else PROBLEMS)
    words = open_text(spec, Tokenizer.open(source.path), samples=samples, length=seq_len, seed=seed)
    folder = show_student(console, make_student(source, sizes, words, plan, output), plan)
    if quiet:
        click.echo(str(folder))
