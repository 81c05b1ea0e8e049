"""r1q export: another format from a finished checkpoint."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--to", "formats", required=True, metavar="FORMAT,…", help="gguf, gptq, onnx, or several with commas.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Output folder. [default: beside the checkpoint]")
@click.option(
    "--kv",
    type=click.Choice(["float", "int8"]),
    default="float",
    show_default=True,
    help="Keys and values of an ONNX folder: int8 takes a quarter of the memory, and a pass over calibration text.",
)
@click.option("--calibration", metavar="SPEC", default="builtin", show_default=True, help="Text for --kv int8.")
def export(checkpoint: Path, formats: str, output: Path | None, kv: str, calibration: str) -> None:
    """Write another format from CHECKPOINT, a folder that `r1q quantize` made or anybody's GPTQ folder; codes are copied."""
    from r1q.core.formats import parse_formats
    from r1q.plan.kv_cache import CacheText, cache_text
    from r1q.plan.reexport import reexport
    from r1q.plan.render import make_console, show_exported
    from r1q.plan.walk import Exported

    names = parse_formats(formats)
    for result in reexport(checkpoint, names, output, cache_text(kv, names, CacheText(calibration=calibration))):
        if isinstance(result, Exported):
            show_exported(make_console(quiet=False), result)
