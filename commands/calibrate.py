"""r1q calibrate: a float model's activations on text, as an importance matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("model", required=False)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to write, such as stats.gguf."
)
@click.option("--calibration", metavar="SPEC", default="builtin", show_default=True, help="Text, as for r1q quantize.")
@click.option("--samples", type=click.IntRange(min=1), default=128, show_default=True, help="Windows of text.")
@click.option("--seq-len", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a window.")
@click.option("--process-output", is_flag=True, help="Take the head in too (output.weight).")
@click.option("-q", "--quiet", is_flag=True, help="No progress; only errors and the file's path.")
def calibrate(quiet: bool, **options: Any) -> None:
    """Write llama.cpp's importance matrix of MODEL: which inputs of its layers are large on calibration text.

    MODEL is what r1q quantize takes. The file is read by llama-quantize and r1q quantize, with --imatrix. (r1q quantize --effort
    needs no such file: it calibrates by itself, with more than this diagonal.)

    \b
    Examples:
      r1q calibrate ./model -o stats.gguf
      r1q calibrate ./model -o stats.gguf --calibration traces.jsonl:0.5,builtin:0.5
    """
    from r1q.core.allocator import return_freed_memory
    from r1q.plan.calibrate import Statistics, calibrate_model
    from r1q.plan.render import make_console, show_calibration

    return_freed_memory()
    path = show_calibration(make_console(quiet), calibrate_model(Statistics(**options), progress=not quiet))
    if quiet:
        click.echo(str(path))
