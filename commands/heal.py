"""r1q heal: train the scales of a quantized model, codes untouched."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("quantized", metavar="OUTPUT", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New output folder.  [default: OUTPUT-healed]")
@click.option("--steps", type=click.IntRange(min=1), default=100, show_default=True, help="Steps of training.")
@click.option("--rows", type=click.IntRange(min=1), default=4, show_default=True, help="Windows of text a step.")
@click.option(
    "--lr", type=click.FloatRange(min=0, min_open=True), default=1e-4, show_default=True, help="Relative change a step."
)
@click.option("--every", type=click.IntRange(min=1), default=20, show_default=True, help="Steps between measurements.")
@click.option("--patience", type=click.IntRange(min=1), default=4, show_default=True, help="Measurements without gain.")
@click.option(
    "--text", metavar="SPEC", default="builtin", show_default=True, help="Text, as --calibration of r1q quantize."
)
@click.option(
    "--samples", type=click.IntRange(min=2), default=256, show_default=True, help="Windows; a sixteenth is kept apart."
)
@click.option("--seq-len", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens of a window.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of the text.")
@click.option("--reference", metavar="MODEL", help="The float model.  [default: the one OUTPUT was made from]")
@click.option("-q", "--quiet", is_flag=True, help="No progress; only errors and the result's path.")
def heal(
    quantized: Path,
    output: Path | None,
    steps: int,
    rows: int,
    lr: float,
    every: int,
    patience: int,
    text: str,
    samples: int,
    seq_len: int,
    seed: int,
    reference: str | None,
    quiet: bool,
) -> None:
    """Train the scales and norms of OUTPUT, a folder of r1q quantize, on the float model's predictions.

    Codes stay as they are, so files keep their size; the result is kept only where the divergence falls on text kept apart, and is
    written in the formats that OUTPUT has. The command can be killed at any moment: run it again and it goes on.

    \b
    Examples:
      r1q heal r1q-out/tiny-r1-q4_0 --text problems
      r1q heal r1q-out/model-q4_0 --steps 200 --text traces.jsonl:0.5,builtin:0.5
    """
    from r1q.commands.healing import Asked, heal_output, show_healing
    from r1q.core.allocator import return_freed_memory
    from r1q.distill.train import Plan
    from r1q.plan.render import make_console

    return_freed_memory()
    asked = Asked(
        quantized=quantized,
        output=output or quantized.with_name(f"{quantized.name}-healed"),
        plan=Plan(steps=steps, rows=rows, lr=lr, every=every, patience=patience),
        text=text,
        samples=samples,
        length=seq_len,
        seed=seed,
        reference=reference,
    )
    for path in show_healing(make_console(quiet), heal_output(asked, progress=not quiet), asked.plan):
        if quiet:
            click.echo(str(path))
