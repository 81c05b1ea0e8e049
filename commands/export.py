"""r1q export: another format from a finished checkpoint."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--to", "formats", required=True, metavar="FORMAT,…", help="gguf, gptq, onnx, or several with commas.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Output folder. [default: beside the checkpoint]")
def export(checkpoint: Path, formats: str, output: Path | None) -> None:
    """Write another format from CHECKPOINT, a folder that `r1q quantize` made: codes are copied, never made again."""
    from r1q.core.formats import parse_formats
    from r1q.plan.reexport import reexport
    from r1q.plan.render import make_console, show_exported

    for result in reexport(checkpoint, parse_formats(formats), output):
        show_exported(make_console(quiet=False), result)
